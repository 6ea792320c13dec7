#!/usr/bin/env python3
"""tests/make_sentencepiece.py - small SentencePiece models and the ids that SentencePiece gives.

Writes tests/data/spm_*.model and tests/data/spm_expected.txt, whose lines are the model's name, a
text in hexadecimal digits and its ids. Needs sentencepiece 0.2.3 and protobuf.

    python3 tests/make_sentencepiece.py
"""
import os
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")

# What a precompiled map does, in few rules: full-width to ASCII, a ligature, a space that is none,
# a letter that vanishes, two characters that become one.
RULES = [("\uff21", "A"), ("\uff22", "B"), ("\ufb01", "fi"), ("\u00a0", " "), ("\u200b", ""),
         ("e\u0301", "\u00e9"), ("\u2026", "..."), ("\u3000", " "), ("\t", " "), ("\n", " ")]

MODELS = {
    # as Llama 2's
    "bpe": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, user_defined_symbols=["<code>"],
                control_symbols=["<|im_end|>"]),
    # as Gemma's
    "bpe_plain": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                      remove_extra_whitespaces=False, add_dummy_prefix=False, pad_id=0, eos_id=1,
                      bos_id=2, unk_id=3, user_defined_symbols=["\n", "\n\n", "<spare>"]),
    "bpe_rules": dict(model_type="bpe", byte_fallback=False, normalization_rule_tsv="rules",
                      remove_extra_whitespaces=True),
    "unigram": dict(model_type="unigram", byte_fallback=False, normalization_rule_tsv="rules",
                    remove_extra_whitespaces=True, user_defined_symbols=["<code>"]),
    "unigram_bytes": dict(model_type="unigram", byte_fallback=True, unused=True,
                          normalization_rule_name="identity", remove_extra_whitespaces=False),
}

# In front of and behind a token of its own GGUF's readers put a blank otherwise than SentencePiece:
# no such texts here but one that ends with it.
TEXTS = [
    "", " ", "a", "Hello world", " two  spaces and   three ", "na\u00efve caf\u00e9 e\u0301",
    "\u00a0nbsp\u3000wide", "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 \u4e2d\u6587",
    "1234567890 3.14", "line\nline\n\n\nline\ttab\r\n", "\U0001f642 emoji\u2026",
    "\uff21\uff22\uff23 \ufb01n", "zero\u200bwidth \u200b", "a<code>",
    "The quick brown fox jumps over the lazy dog.", "if (x > 0) { return x; } // done",
    "don't won't I'm", "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "aaaaaaaaaaaaaaaaaaaaaaaa", "    indented", "trailing   ", "\u2581mark x\u2581y",
    "<0x41><s></s><unk>", "<spare> x"]


def mark_unused(path):
    """Marks every third piece of several characters as one that is never made from text."""
    model = sentencepiece_model_pb2.ModelProto()
    with open(path, "rb") as f:
        model.ParseFromString(f.read())
    for piece in [p for p in model.pieces if p.type == p.NORMAL and len(p.piece) > 2][::3]:
        piece.type = piece.UNUSED
    with open(path, "wb") as f:
        f.write(model.SerializeToString())


def main():
    sample = open(os.path.join(DATA, "tokenizer_sample.txt"), encoding="utf-8").read()
    lines = [line for line in sample.split("\n") if line.strip()]
    # few characters, so that small vocabularies suffice; the others are unknown, or bytes
    book = open(os.path.join(DATA, "eval_text.txt"), encoding="utf-8").read().split("\n")
    train = [line for line in lines + book if line.strip() and all(ord(c) < 0x100 for c in line)]
    rules = os.path.join(DATA, "spm_rules.tsv")
    with open(rules, "w") as f:
        for a, b in RULES:
            f.write("\t".join(" ".join("%X" % ord(c) for c in text) for text in (a, b)) + "\n")
    with open(os.path.join(DATA, "spm_expected.txt"), "w") as out:
        out.write("# sentencepiece %s\n" % sentencepiece.__version__)
        for name, options in MODELS.items():
            options = dict(options)
            unused = options.pop("unused", False)
            if "normalization_rule_tsv" in options:
                options["normalization_rule_tsv"] = rules
            prefix = os.path.join(DATA, "spm_" + name)
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(train), model_prefix=prefix, vocab_size=480,
                character_coverage=0.98, num_threads=1, minloglevel=2, hard_vocab_limit=False,
                self_test_sample_size=0, **options)
            os.remove(prefix + ".vocab")
            if unused:
                mark_unused(prefix + ".model")
            model = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
            for text in TEXTS + [line for line in lines if len(line) < 160][::4]:
                ids = model.encode(text)
                digits = text.encode().hex() or "-"
                out.write("%s %s %s\n" % (name, digits, " ".join(map(str, ids))))
    os.remove(rules)


if __name__ == "__main__":
    main()
