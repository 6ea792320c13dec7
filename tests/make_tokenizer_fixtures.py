#!/usr/bin/env python3
"""Makes the data of tests/test_tokenizer.c, with the PyPI packages `tokenizers` and `zstandard` (or the
zstd program) as the oracle:

    tests/data/tokenizer_sample.txt    lines in many scripts, code, emoji, odd blanks
    tests/data/tok_*.json              small tokenizers, trained or written here
    tests/data/tokenizer_expected.txt  name, flags, bytes of text, number of ids, hash of the ids;
                                       bytes and hash of decode(), with and without special tokens

    python3 tests/make_tokenizer_fixtures.py [SHARED]

SHARED is a folder with data/tokenizers/*.tokenizer.json.zst. Training is not reproducible: a small
tokenizer that is there already is used as it is. The long texts are not stored: corpus() below
and corpus_make() in the test derive the same text from the sample.
"""
import json
import os
import subprocess
import sys

import tokenizers
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, "data")
MASK = (1 << 64) - 1
CORPUS_BYTES = 1200000

LINES = r"""
All human beings are born free and equal in dignity and rights. They're endowed with reason, aren't they?
I'll say it's what we've got: you'd think I'm done, but they'LL SAY 'TIS NOT; SHE'S HERE, WE'RE THERE'S'T.
Tous les êtres humains naissent libres et égaux en dignité et en droits. L'été, c'est déjà fini !
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Größe, Straße, Übermut: 3,14 €.
Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Qué tal? ¡Mañana!
Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Perché no?
Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Não, coração.
Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Źdźbło, łódź.
Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Příliš žluťoučký kůň.
Toate ființele umane se nasc libere și egale în demnitate și în drepturi.
Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İstanbul'da ılık ğ.
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.
Все люди рождаются свободными и равными в своем достоинстве и правах. Ёлка, съезд, №5.
Всі люди народжуються вільними і рівними у своїй гідності та правах. Їжак, ґанок.
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. ΣΊΣΥΦΟΣ
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שָׁלוֹם עֲלֵיכֶם
يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. السَّلَامُ عَلَيْكُمْ ٣٫١٤ و٤٢
تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. ۱۲۳۴۵
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १२३
সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। ৪৫৬
மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும் சமமானவர்கள்.
ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు.
ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ. മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടെ ജനിച്ചവരാണ്.
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓ น้ำ
ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ. មនុស្សទាំងអស់កើតមកមានសេរីភាព។ လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့်
ཡོངས་ཁྱབ་གསལ་བསྒྲགས། འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས
ყველა ადამიანი იბადება თავისუფალი და თანასწორი. Բոլոր մարդիկ ծնվում են ազատ ու հավասար։
ሰው፡ሁሉ፡ሲወለድ፡ነጻና፡በክብርና፡በመብትም፡እኩልነት፡ያለው፡ነው። ᎠᎴ ᎤᏂᎦᏎᏍᏔ ᐅᓗᑎᓕᒫᖅ
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。价格：１２３元（约￥99.8）。
人人生而自由，在尊嚴和權利上一律平等。𠮷野家、𪚥𠀋龘。「繁體字」與『标点』——混排English字123。
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。カタカナ・ﾊﾝｶｸ・ぱぴぷ、がぎぐ。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. ᄒᆞᆫ글 가각힣
int main(int argc, char **argv) { for (size_t i = 0; i < n; i++) sum += a[i] * 0x1F; return !sum; }
    if (x >= 10 && y != NULL || !(z & ~0x7fu)) {	/* tab */ printf("%5.2f\t%s\n", x->y, "a\\b"); }
def f(self, *args, **kwargs):  # TODO: fix
        return {k: [v**2 for v in vs if v % 3 == 1] for k, vs in kwargs.items()} or lambda x: x @ y
<!DOCTYPE html><div class="a b" id='x'>&nbsp;&amp;</div><br/><script>let a=()=>{...b};</script></table></td>
{"name": "moe", "values": [1, 2.5e-10, -3, true, null], "nested": {"a/b": "\u00e9\n"}}
SELECT t.id, COUNT(*) FROM `table` t WHERE t.x LIKE '%abc_%' GROUP BY 1 ORDER BY 2 DESC; -- comment
$ curl -sSL https://example.com/a/b?c=d&e=f#g | tar xzf - && cd ~/src_2024-01-02T03:04:05.678Z || exit 1
#include <stdio.h>//==----===----==//#define MAX(a,b) ((a)>(b)?(a):(b))\\\\\\\\//////////////////////////////////
fn main() -> Result<(), Box<dyn Error>> { let x: &'static str = r#"raw"#; match x { _ => Ok(()) } }
\frac{\partial u}{\partial t} = \alpha \nabla^2 u, \quad \sum_{i=0}^{\infty} x^i ≈ ∫₀¹ f(x)dx ⟹ ∀ε>0 ∃δ ∈ ℝ
CamelCaseIdentifier snake_case_name SCREAMING_SNAKE kebab-case-name HTTPServer2XMLParser iPhone13ProMax McDonald's
1 12 123 1234 12345 123456 1234567 12345678 1,234,567.89 0xDEADBEEF 1e10 ½ ¼ ² ³ Ⅳ ⅷ ① ⑳ ㊿ 一二三 ٤٢ 𝟘𝟙𝟚
😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☺ ✂️ 🧑🏿‍🚀 1️⃣ #️⃣ 🫠🫡 🪿 ©®™ ←↑→↓ ♠♣♥♦ ★☆ ✓✗ ■□▪▫ ░▒▓█ ┌─┐│└┘
é ü ñ å (composed) é ü ñ å (decomposed) Å Å Å ﬁ ﬂ ﬃ ǆ ǅ Ǆ ẞ ß ſ K ‖ … ‥ ﹏ Ａｂｃ１２３ ㎏ ㍿ ﷺ ａ̈
q̣̇ q̣̇ ẛ̣ Ç̌́ a̴̸͎̕͜ Z̷̧͇̪͙͌̒ȧ̵l̶̨g̸o̷ क़ ড় ਖ਼ שּׁ 각 각 ⫝̸ 𝅗𝅥 à֮b
“Curly” ‘quotes’ «guillemets» „low“ ‚x‘ – — ― ‐ ‑ • · ′ ″ ‰ † ‡ § ¶ ¿ ¡ ª º ¬ ¦ ¨ ¯ ´ ¸ × ÷ ± µ
a b c d e f　g h​i‌j‍k﻿l⁠m­n᠎o p q
  leading   spaces    and	tabs		here   trailing   
mixed 	 	  	   blanks      and                                  long runs
---- ==== **** #### ____ ~~~~ .... !!!! ???? ,,,, :::: ;;;; (((( )))) [[[[ ]]]] {{{{ }}}} <<<< >>>> @@@@ %%%% ^^^^
don't DON'T Don’T o'clock rock'n'roll y'all'd've 'sup 'S 'Re 'ſ 'LL 'vE 'm' 't'd's ''s '' ' I've'nt
<|im_start|>user<|im_end|> <|begin_of_text|><|eot_id|> <s>[INST] </s> <｜User｜>hi<｜Assistant｜> <start_of_turn>model<end_of_turn>
<think>hm</think> <tool_call>{}</tool_call> <|endoftext|><|fim_prefix|> <mask><pad><unk><bos><eos> [MASK] [CLS][SEP] <unused3> [multimodal]
<|start|>assistant<|channel|>final<|message|>ok<|return|> <｜fim▁hole｜> <｜end▁of▁sentence｜> <|reserved_special_token_7|> <0x0A><0xE4>
▁▁lower▁blocks▁ ▁ and _underscores_ Ġmerged Ċ <|notatoken|> <|im_end |> < |im_end|> <h1>Title</h1><blockquote><td>
""".strip("\n").split("\n")


def sample():
    rows = [s.encode("utf-8", "surrogatepass").decode("utf-8") for s in LINES]
    rows.append("line\r\nends\rand\x0bothers\x0c\u0085\u2028\u2029\x1c\x1d\x1e\x1f\x00\x01\x7f")
    rows.append("noncharacters \ufffe\uffff \U0001fffe private \ue000\uf8ff\U000f0000 tags \U000e0041\U000e007f")
    rows.append("unassigned \u0378\u05ff \U000105d2\u0307 \U00016121 new \U00011935\U00011930 \ua7f2 \u0897")
    return "\x1e\n".join(rows)


class Random:
    """xorshift64*, as test_random() in tests/test.h."""

    def __init__(self, seed):
        self.x = seed

    def next(self, n):
        x = self.x
        x ^= x >> 12
        x ^= (x << 25) & MASK
        x ^= x >> 27
        self.x = x
        return ((x * 2685821657736338717 & MASK) >> 32) % n


BLANKS = [0x20, 0x20, 0x20, 0x0A, 0x09, 0x0D, 0xA0, 0x3000, 0x2009, 0x0A]
CONTRACTIONS = ["'s", "'S", "'t", "'ll", "'LL", "'\u017f", "'re", "'Ve", "'d", "'m"]


def scalar(c):
    return c + 0x1000 if 0xD800 <= c < 0xE000 else c


def piece(r, lines):
    kind = r.next(16)
    line = lines[r.next(len(lines))]
    if kind < 7:
        return line + ["\n", " ", "\n\n", ""][r.next(4)]
    if kind == 7:
        a = r.next(len(line))
        return line[a:a + r.next(12)]
    n = 1 + r.next(9)
    if kind == 8:
        return "".join(chr(BLANKS[r.next(10)]) for _ in range(n))
    if kind == 9:
        return "".join(chr(48 + r.next(10)) for _ in range(n))
    if kind == 10:
        return "".join(chr(32 + r.next(95)) for _ in range(n))
    if kind == 11:
        return "".join(chr(scalar(r.next(0x30000))) for _ in range(n))
    if kind == 12:
        return line[r.next(len(line))] * (n * n)
    if kind == 13:
        return chr(97 + r.next(26)) + "".join(chr(0x300 + r.next(0x70)) for _ in range(n))
    if kind == 14:
        return "".join(chr(0x1F300 + r.next(0x700)) for _ in range(n))
    return line[:3] + CONTRACTIONS[r.next(10)]


def corpus(text, n_bytes, seed):
    lines = text.split("\x1e\n")
    r = Random(seed)
    out, total = [], 0
    while total < n_bytes:
        p = piece(r, lines)
        out.append(p)
        total += len(p.encode())
    return "".join(out)


def fnv_bytes(data):
    h = 14695981039346656037
    for b in data:
        h = (h ^ b) * 1099511628211 & MASK
    return h


def fnv(ids):
    h = 14695981039346656037
    for i in ids:
        for _ in range(4):
            h = (h ^ (i & 255)) * 1099511628211 & MASK
            i >>= 8
    return h


def looks_control(text):
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"), ("[@", "@]"))
    return (any(len(text) > len(a) + len(b) and text.startswith(a) and text.endswith(b)
                for a, b in pairs) or text in ("<pad>", "<mask>"))


def plain_oracle(source):
    """The tokenizer that leaves control tokens alone: what looks like one counts as special."""
    data = json.loads(source)
    for t in data.get("added_tokens") or []:
        t["special"] = t["special"] or looks_control(t["content"])
    tok = Tokenizer.from_str(json.dumps(data))
    tok.encode_special_tokens = True
    return tok


def expected(name, source, text, out):
    """Rows for flags 0 (plain), 2 (parse special), 3 (and add special)."""
    for flags, tok in ((0, plain_oracle(source)), (2, Tokenizer.from_str(source)),
                       (3, Tokenizer.from_str(source))):
        if flags == 0 and name == "unigram":
            continue  # the oracle's model spells "</s>" out of plain text; ours must not
        ids = tok.encode(text, add_special_tokens=flags == 3).ids
        texts = [tok.decode(ids, skip_special_tokens=skip).encode() for skip in (False, True)]
        out.append(f"{name} {flags} {len(text.encode())} {len(ids)} {fnv(ids):016x} " +
                   " ".join(f"{len(t)} {fnv_bytes(t):016x}" for t in texts))


def train(tok, trainer, text):
    tok.train_from_iterator(text.replace("\x1e", "").split("\n"), trainer)
    return tok


ADDED = [AddedToken("<|im_start|>", special=True, normalized=False),
         AddedToken("<|im_end|>", special=True, normalized=False, rstrip=True),
         AddedToken("<mask>", special=True, lstrip=True, normalized=False),
         AddedToken("<tool_call>", special=False, normalized=False),
         AddedToken("word", special=False, single_word=True, normalized=True),
         AddedToken("Caf\u00e9", special=False, normalized=True),
         AddedToken("    ", special=False, normalized=False)]


def bpe_bytes(text):
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}|"
                                   r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    train(tok, trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet()), text)
    tok.add_tokens(ADDED)
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|im_start|> $A <|im_end|>",
                                      special_tokens=[(t, tok.token_to_id(t))
                                                      for t in ("<|im_start|>", "<|im_end|>")])])
    return tok


def bpe_gpt2(text):
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    train(tok, trainers.BpeTrainer(vocab_size=500, show_progress=False,
                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet()), text)
    tok.add_tokens(ADDED)
    return tok


def bpe_marks(text):
    """Llama 2's form: marks for spaces, byte fallback."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    train(trained, trainers.BpeTrainer(vocab_size=600, show_progress=False, limit_alphabet=150,
                                       special_tokens=["<unk>", "<s>", "</s>"]), text)
    data = json.loads(trained.to_str())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({f"<0x{b:02X}>": 3 + b for b in range(256)})
    for t in sorted(data["model"]["vocab"], key=data["model"]["vocab"].get):
        vocab.setdefault(t, len(vocab))
    merges = [tuple(m) for m in data["model"]["merges"]]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True,
                               byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                           normalizers.Replace(" ", "\u2581")])
    tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False)
                            for t in ("<unk>", "<s>", "</s>")])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok


def bpe_words(text):
    """Prefixes, suffixes, unknown characters, and the less usual splitters."""
    tok = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##",
                               end_of_word_suffix="</w>"))
    tok.normalizer = normalizers.Sequence([
        normalizers.NFD(), normalizers.StripAccents(), normalizers.Strip(left=True, right=True),
        normalizers.Replace(Regex(r"[\u2018\u2019]"), "'"), normalizers.Replace("--", "\u2014")])
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.Digits(), pre_tokenizers.Split("e", "merged_with_previous"),
        pre_tokenizers.Split(Regex("[aou]"), "merged_with_next"),
        pre_tokenizers.Split(Regex(r"\w+"), "isolated", invert=True),
        pre_tokenizers.Split(Regex(r"(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])"), "removed")])
    tok.decoder = decoders.BPEDecoder("</w>")
    train(tok, trainers.BpeTrainer(vocab_size=700, show_progress=False, limit_alphabet=120,
                                   special_tokens=["[UNK]"], continuing_subword_prefix="##",
                                   end_of_word_suffix="</w>"), text)
    return tok


def unigram(text):
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(),
                                           normalizers.Replace(Regex(" {2,}"), " ")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Metaspace(prepend_scheme="first")
    train(tok, trainers.UnigramTrainer(vocab_size=500, show_progress=False, unk_token="<unk>",
                                       special_tokens=["<unk>", "</s>"]),
          "".join(c for c in text if ord(c) < 0x250))
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tok.token_to_id("</s>"))])
    return tok


def wordpiece(text):
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    train(tok, trainers.WordPieceTrainer(vocab_size=600, show_progress=False, limit_alphabet=200,
                                         special_tokens=["[UNK]", "[CLS]", "[SEP]"]), text)
    tok.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tok


def small_tokenizers(text):
    for make in (bpe_bytes, bpe_gpt2, bpe_marks, bpe_words, unigram, wordpiece):
        path = os.path.join(DATA, f"tok_{make.__name__}.json")
        if not os.path.exists(path):
            make(text).save(path, pretty=False)
        with open(path, encoding="utf-8") as f:
            yield make.__name__, f.read()


def main():
    text = sample()
    os.makedirs(DATA, exist_ok=True)
    with open(os.path.join(DATA, "tokenizer_sample.txt"), "wb") as f:
        f.write(text.encode())
    out = [f"# tokenizers {tokenizers.__version__}"]
    small = corpus(text, 40000, 1)
    for name, source in small_tokenizers(text):
        expected(name, source, small, out)
    if len(sys.argv) > 1:
        large = corpus(text, CORPUS_BYTES, 2)
        folder = os.path.join(sys.argv[1], "data", "tokenizers")
        for file in sorted(os.listdir(folder)):
            if file.endswith(".tokenizer.json.zst"):
                source = subprocess.run(["zstd", "-dc", os.path.join(folder, file)], check=True,
                                        capture_output=True).stdout.decode()
                expected(file[:-len(".tokenizer.json.zst")], source, large, out)
    with open(os.path.join(DATA, "tokenizer_expected.txt"), "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
