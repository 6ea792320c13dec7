#!/usr/bin/env python3
"""Writes core/unicode_data.h: the properties of characters as the Hugging Face `tokenizers` library
sees them. That library mixes three generations of Unicode (its regular expressions, Rust's standard
library, and older crates for normalization and punctuation), so each table is asked of the library
itself, character by character, instead of being taken from one version of the Unicode database.

    python3 tests/make_unicode_data.py core/unicode_data.h        (needs PyPI `tokenizers`, ~1 min)
"""
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

CPS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
ALL = "".join(map(chr, CPS))
CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co "
              "Cs Cn").split()
SCRIPTS = ("Arabic Armenian Bengali Bopomofo Cyrillic Devanagari Ethiopic Georgian Greek Gujarati "
           "Gurmukhi Han Hangul Hebrew Hiragana Kannada Katakana Khmer Lao Latin Malayalam "
           "Mongolian Myanmar Sinhala Tamil Telugu Thai Tibetan").split()


def regex_set(pattern):
    """The characters that a regular expression for one character matches."""
    rest = set()
    for _, (a, b) in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(ALL):
        rest.update(range(a, b))
    return {c for i, c in enumerate(CPS) if i not in rest}


def ranges(cps):
    out = []
    for c in sorted(cps):
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def normalized(normalizer):
    return {c: r for c in CPS if (r := normalizer.normalize_str(chr(c))) != chr(c)}


def bert_punctuation():
    out = set()
    pre = pre_tokenizers.BertPreTokenizer()
    for c in CPS:
        if not chr(c).isspace() and len(pre.pre_tokenize_str(f"a{chr(c)}a")) == 3:
            out.add(c)
    return out


def normalization_active():
    """Characters that decompose, or have a combining class, in the library's Unicode version."""
    out = set(normalized(normalizers.NFKD()))
    nfd = normalizers.NFD()
    for c in CPS:
        ch = chr(c)
        moves = (nfd.normalize_str("a" + ch + "\u0334") == "a\u0334" + ch or
                 nfd.normalize_str("a\u0345" + ch) == "a" + ch + "\u0345")
        if moves or unicodedata.combining(ch) in (1, 240):
            out.add(c)
    nfc = normalizers.NFC()
    for c, r in normalized(nfd).items():  # second halves of compositions may be plain: Hangul, ...
        if len(r) >= 2 and nfc.normalize_str(r) == chr(c):
            out.update(map(ord, r[1:]))
    return out


def lower_runs():
    """(first, last, step, delta): characters first, first + step, ... last become c + delta."""
    low = {c: ord(r) for c, r in normalized(normalizers.Lowercase()).items() if len(r) == 1}
    out = []
    for c in sorted(low):
        d = low[c] - c
        if out and out[-1][3] == d and c - out[-1][1] in (1, 2):
            step = c - out[-1][1]
            if out[-1][0] == out[-1][1] or out[-1][2] == step:
                out[-1][1], out[-1][2] = c, step
                continue
        out.append([c, c, 1, d])
    return out


def emit(out, text, items, per_line):
    out.append(text + " = {")
    for i in range(0, len(items), per_line):
        out.append("    " + ", ".join(items[i:i + per_line]) + ",")
    out.append("};\n")


def emit_ranges(out, name, comment, cps):
    out.append(f"/* {comment} */")
    emit(out, f"static const uint32_t {name}[][2]",
         [f"{{0x{a:X}, 0x{b:X}}}" for a, b in ranges(cps)], 5)


def main():
    sets = {c: regex_set(r"\p{%s}" % c) for c in CATEGORIES if c != "Cs"}
    sets["Cs"] = set(range(0xD800, 0xE000))
    gc = [0] * 0x110000
    for i, name in enumerate(CATEGORIES):
        for c in sets[name]:
            gc[c] = i
    starts = [c for c in range(0x110000) if c == 0 or gc[c] != gc[c - 1]]
    out = ["/* core/unicode_data.h - properties of characters. Made by tests/make_unicode_data.py from",
           f" * the `tokenizers` package {tokenizers.__version__}; do not edit. */",
           "#ifndef MOE_CORE_UNICODE_DATA_H", "#define MOE_CORE_UNICODE_DATA_H", "",
           "#include <stdint.h>", "",
           "/* General categories, in the order of the numbers in unicode_runs. */"]
    emit(out, "static const char unicode_category_names[][3]", [f'"{c}"' for c in CATEGORIES], 10)
    out.append("/* first character << 5 | category, of each run of characters of one category */")
    emit(out, "static const uint32_t unicode_runs[]", [f"0x{c << 5 | gc[c]:X}" for c in starts], 10)
    for s in SCRIPTS:
        emit_ranges(out, f"unicode_script_{s.lower()}", f"script {s}", regex_set(r"\p{%s}" % s))
    letters = set().union(*(sets[c] for c in ("Lu", "Ll", "Lt", "Lm", "Lo", "Nl")))
    emit_ranges(out, "unicode_other_alphabetic", "Alphabetic beside L and Nl",
                regex_set(r"\p{Alphabetic}") - letters)
    punct = set().union(*(sets[c] for c in ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po")))
    punct |= {c for c in range(33, 127) if not chr(c).isalnum()}
    bert = bert_punctuation()
    emit_ranges(out, "unicode_punctuation_less", "P and ASCII symbols that the punctuation splitters "
                "do not know", punct - bert)
    emit_ranges(out, "unicode_punctuation_more", "what they know beside P", bert - punct)
    accents = {c for c, r in normalized(normalizers.StripAccents()).items() if not r}
    emit_ranges(out, "unicode_accents", "what StripAccents removes", accents)
    keep = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=False,
                                      strip_accents=False, lowercase=False)
    emit_ranges(out, "unicode_bert_removed", "what BertNormalizer's clean_text removes",
                {c for c, r in normalized(keep).items() if not r})
    emit_ranges(out, "unicode_norm_active", "characters that normalization may change or reorder; "
                "newer ones are left alone", normalization_active())
    emit_ranges(out, "unicode_norm_base", "first halves of compositions",
                {ord(r[0]) for r in normalized(normalizers.NFD()).values()})
    out.append("/* lowercase: first, last, step, difference. U+0130 becomes two characters. */")
    emit(out, "static const int32_t unicode_lower[][4]",
         [f"{{0x{a:X}, 0x{b:X}, {s}, {d}}}" for a, b, s, d in lower_runs()], 4)
    out.append("#endif")
    with open(sys.argv[1], "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n")


main()
