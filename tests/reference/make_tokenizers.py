#!/usr/bin/env python3
"""Writes the golden files of tokenizers with Hugging Face's, the reference Tidemill is held to.

    pip install transformers tokenizers gguf
    python tests/reference/make_tokenizers.py SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf GEMMA_FOLDER

GEMMA_FOLDER holds the published `tokenizer.json` and `tokenizer_config.json` of Gemma 3.

`smollm2-135m-tokenizer.json`, `gemma-3-270m-tokenizer.json`: token ids of texts that tokenizers like to get wrong, and
of paragraphs in many languages; for Gemma also its chat template and prompts rendered with it.
`tokenizers/`: small tokenizers of the kinds whose models are too large to fetch for a test, learned here from the
paragraphs, each as the tables of a GGUF and as a Hugging Face folder, with token ids of the same texts.
"""
import argparse
import hashlib
import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from make_golden import load_tokenizer as load_smollm2

HERE = pathlib.Path(__file__).parent

# Short texts that tokenizers like to get wrong.
TORTURE = [
    "", " ", "  ", "\n", "\n\n \n", "\t\tif x:\n\t\t\treturn 1\n", "Hello, world!", "hello   world  ", " leading and trailing ",
    "1234567890", "3.14159 and 2,718,281 or 0x1F", "2024-02-29T23:59:59Z", "don't I'll we've you're it's he'd I'm",
    "DON'T WE'VE", "für Größe, Straße und Äpfel", "L’été à Noël, ça va bien; garçon où?", "¿Dónde está el niño? ¡Mañana!",
    "Привет, как дела? Ёлка", "你好，世界。今天天气很好！", "こんにちは世界、カタカナとひらがな", "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया", "Γειά σου Κόσμε", "שלום עולם", "สวัสดีชาวโลก", "😀👩‍👩‍👧‍👦🇩🇪 ❤️", "e\u0301 vs é, ﬁ and Å",
    "fn main() { println!(\"{:?}\", vec![1u8; 16]); } // done", "SELECT * FROM t WHERE a<>'b' AND c>=10;",
    "https://example.com/a?b=c&d=%20#e", "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b<|endoftext|>", "<|im_start", "\u200b\ufeff\u00a0x",
    "²½①Ⅷ५", "\r\nline\r\n", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "\x00\x01\x7f", "_snake_case CamelCase kebab-case", "....!!!???",
    "<start_of_turn>user\nhi<end_of_turn>\n", "<b>bold</b><table><tr><td>1</td></tr></table>", "▁ already ▁▁ marked", " " * 45 + "x",
    "\n" * 40 + "\t" * 35 + "y", "a \n b\n\n  c\n\n\n   d", "[multimodal]<unused7><mask>", "\U00010348 \U0001F9FF\u3400\uE000", "<0x41>",
    "İstanbul ǅ ß ﬃ ½", "क्‍ष ക്ഷ த்ரீ", "Z̸̢̛a̷͝l̵g̴o̶", "12 345,67 € 1.000.000 ¥ ٣٫١٤", "x²+y²=z² ∑∫√∞ ≠", "C:\\Users\\me\\file.txt",
]
# Paragraphs written for this test.
PARAGRAPHS = {
    "English": "The ferry left the island a little after seven, an hour late because of the fog. On deck, a teacher counted her "
               "pupils twice (31 of them!) while the captain's dog slept on a coil of rope.\n\nBy noon they'd reached the harbor; "
               "nobody complained about the weather any more.",
    "German": "Am Dienstagmorgen überquerte der Güterzug die Brücke bei Köln, obwohl das Signal längst auf Rot stand. Die "
              "Bundespolizei prüft nun, ob die Straßenbahnhaltestelle „Großer Weiher“ vorübergehend geschlossen werden muss.",
    "French": "L’été dernier, les élèves de l’école ont planté cinquante-deux chênes près de l’étang. « C’est à nous d’en prendre soin », "
              "disait Zoé, dont le grand-père était garde forestier ; aujourd’hui, où sont-ils ?",
    "Spanish": "¿Quién habría imaginado que el pequeño museo del barrio recibiría a diez mil visitantes en otoño? «Ni nosotros», "
               "respondió la dueña, señalando la cigüeña de cerámica que cuelga del techo.",
    "Polish": "Wczoraj wieczorem w Łodzi zgasło światło na całej ulicy Piotrkowskiej. Żółte tramwaje stały przez czterdzieści minut, "
              "a pasażerowie śpiewali, żeby się ogrzać; ktoś przyniósł nawet gorącą zupę.",
    "Turkish": "İstanbul'da yağmur üç gündür dinmiyor. Iğdır'dan gelen yolcular, ışıkları sönmüş köprünün öbür ucunda bekleyen "
               "şoförü göremedikleri için güçlükle otobüse ulaştılar.",
    "Vietnamese": "Sáng nay, chợ nổi đông hơn thường lệ vì người dân các xã lân cận chở dưa hấu đến bán. Bà Nguyễn Thị Hạnh nói giá năm nay "
                  "giảm gần một nửa, nhưng trời nắng đẹp nên ai cũng vui.",
    "Russian": "Вчера вечером в маленьком городе на берегу реки открыли новую библиотеку. Её построили за 14 месяцев; объём фонда — "
               "почти сорок тысяч книг, и ещё столько же обещают привезти к весне.",
    "Greek": "Το πλοίο έφυγε από τον Πειραιά με δύο ώρες καθυστέρηση, επειδή ο άνεμος έφτανε τα οκτώ μποφόρ. Οι επιβάτες, κουρασμένοι αλλά "
             "ψύχραιμοι, περίμεναν στο κατάστρωμα τρώγοντας κουλούρια.",
    "Hebrew": "בבוקר יום שלישי נפתחה מחדש תחנת הרכבת הישנה בחיפה, אחרי שיפוץ שנמשך שבע שנים. הנוסעים הראשונים קיבלו עוגיות, וילד אחד שאל: "
              "״איפה הקטר?״",
    "Arabic": "افتُتح صباح اليوم سوقُ الكتب المستعملة قرب الميناء القديم، وحضره نحو ٣٠٠ زائر رغم المطر. قالت البائعة إنّ أكثر ما يُطلب هو "
              "القواميس وقصص الأطفال.",
    "Hindi": "पहाड़ी गाँव के स्कूल में इस साल पहली बार कंप्यूटर पहुँचे। शिक्षिका ने बताया कि बच्चे दो घंटे पैदल चलकर आते हैं, फिर भी कोई छुट्टी नहीं करना "
             "चाहता।",
    "Bengali": "নদীর ধারে ছোট্ট বাজারটি ভোর পাঁচটায় জেগে ওঠে। মাছ বিক্রেতারা ডাকাডাকি করেন, আর চায়ের দোকানে খবরের কাগজ পড়া শুরু হয়।",
    "Tamil": "மழை நின்ற பிறகு கிராமத்து ஏரி நிரம்பியது. விவசாயிகள் மகிழ்ச்சியுடன் வயலுக்குச் சென்றனர்; குழந்தைகள் படகு விட்டு விளையாடினார்கள்.",
    "Thai": "เมื่อวานนี้ชาวบ้านช่วยกันซ่อมสะพานไม้ข้ามคลองที่พังเพราะน้ำท่วม ใช้เวลาเพียงสามวันก็เสร็จ เด็ก ๆ จึงไปโรงเรียนได้ตามปกติ",
    "Chinese": "昨天傍晚，老城区的钟楼在修缮三年后重新敲响。附近的居民纷纷走上街头，有人拍照，有人流泪。据统计，共有2,400多人登上了塔顶。",
    "Japanese": "先週の土曜日、山あいの小さな駅に十年ぶりの列車が到着した。ホームでは「おかえりなさい」と書かれた横断幕が揺れ、駅長のミケ（猫）も出迎えた。",
    "Korean": "지난달 바닷가 마을에 작은 등대 도서관이 문을 열었다. 어부들은 새벽 조업을 마치고 들러 커피를 마시며 시집을 읽는다고 한다.",
    "Amharic": "ትናንት ማለዳ በገበያው አቅራቢያ አዲስ የቡና ቤት ተከፈተ። ብዙ ሰዎች ተሰብስበው ጣፋጭ ቡና ጠጡ።",
    "code": "def moving_average(xs, n=3):\n    \"\"\"Mean of the last n values.\"\"\"\n    out = []\n    for i in range(len(xs) - n + 1):\n"
            "        out.append(sum(xs[i:i + n]) / n)   # O(n)\n    return out\n\n\nif __name__ == '__main__':\n\tprint(moving_average([1.5, 2, 3_000]))\n",
}
TEXTS = TORTURE + list(PARAGRAPHS.values()) + ["\n\n".join(PARAGRAPHS.values())]
CONVERSATIONS = [
    (None, "Which city is this article about?"),
    ("You are a news editor.", "  Summarize this article.\n\nThe ferry left late.  "),
    ("Du antwortest auf Deutsch.", "Übersetze: <b>harbor wall</b>"),
]
GPT4_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def ids_of(tokenizer, texts=TEXTS):
    return [{"text": text, "token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]


def write_smollm2(path):
    write(HERE / "smollm2-135m-tokenizer.json", {"gguf_sha256": sha256(path), "texts": ids_of(load_smollm2(path))})


def write_gemma(path, folder):
    published = AutoTokenizer.from_pretrained(folder)
    converted = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for case in ids_of(published):
        # The conversion from GGUF joins runs of more than 31 spaces and literal marks otherwise; the published one counts.
        if " " * 32 not in case["text"] and "▁" not in case["text"]:
            assert converted(case["text"], add_special_tokens=False)["input_ids"] == case["token_ids"], case
    prompts = []
    for system, user in CONVERSATIONS:
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}]
        text = published.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        token_ids = published(text, add_special_tokens=False)["input_ids"]
        assert token_ids[0] == published.bos_token_id and published.bos_token_id not in token_ids[1:]
        prompts.append({"system": system, "user": user, "rendered": text, "token_ids": token_ids})
    write(HERE / "gemma-3-270m-tokenizer.json", {
        "gguf_sha256": sha256(path), "bos_token_id": published.bos_token_id, "chat_template": published.chat_template,
        "prompts": prompts, "texts": ids_of(published)})


def learn(tokenizer, alphabet, limit_alphabet):
    """Learns merges over whole lines, so that a wrong cut shows in the ids."""
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, limit_alphabet=limit_alphabet, show_progress=False)
    lines = [line for text in [*PARAGRAPHS.values(), *TORTURE] for line in text.splitlines()] * 2
    tokenizer.train_from_iterator(lines, trainer)


def write_byte_level(name, split_digits, normalizer, ignore_merges, bos, added):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    learn(tokenizer, pre_tokenizers.ByteLevel.alphabet(), 256)
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(GPT4_SPLIT % split_digits), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    finish(name, tokenizer, bos, added, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name})


def write_sentence_piece(name, only_first):
    """As Llama 2 and Mistral: a space before the text, scores by rank, bytes for what no piece covers.

    Later ones put a space only before text that begins a prompt, `only_first`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Few letters, so that other scripts are spelled in bytes.
    learn(tokenizer, ["▁"], 150)
    learned_vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += sorted(learned_vocab, key=learned_vocab.get)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    # Every way to cut a piece in two is a merge, ranked by the score of the whole: as transformers converts such models.
    merges = []
    for piece, index in vocab.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        cuts = sorted(((a, b) for a, b in cuts if a in vocab and b in vocab), key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        merges += [(-float(index), a, b) for a, b in cuts]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    normalizer = tokenizer.normalizer
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for _, a, b in merges], byte_fallback=True, fuse_unk=True))
    if only_first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    finish(name, tokenizer, "<s>", [("<s>", True), ("</s>", True), ("[INST]", True), ("[/INST]", True)],
           {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": True}, with_gguf=not only_first)


def finish(name, tokenizer, bos, added, metadata, with_gguf=True):
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    template = "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    eos = added[1][0]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template)
    folder = HERE / "tokenizers" / name
    fast.save_pretrained(folder)
    state = json.loads(tokenizer.to_str())
    # One line, to stay small.
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, separators=(",", ":")) + "\n")
    ids = {index: text for text, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [ids[index] for index in range(len(ids))]
    kinds = {text: 3 if special else 4 for text, special in added}
    is_byte = {f"<0x{byte:02X}>" for byte in range(256)} if metadata["tokenizer.ggml.model"] == "llama" else set()
    metadata |= {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [kinds.get(text, 6 if text in is_byte else 1) for text in tokens],
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id(eos), "tokenizer.chat_template": template,
    }
    if bos:
        metadata["tokenizer.ggml.bos_token_id"] = tokenizer.token_to_id(bos)
    if is_byte:
        metadata["tokenizer.ggml.scores"] = [-float(index) for index in range(len(tokens))]
    else:
        metadata["tokenizer.ggml.merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    if with_gguf:
        write_gguf(folder / "vocab.gguf", metadata)
    texts = TEXTS + ["".join(f"{text} x {text}" for text, _ in added)]
    golden = {"texts": ids_of(fast, texts),
              "prompt": {"rendered": fast.apply_chat_template([{"role": "user", "content": " hi "}], tokenize=False)}}
    golden["prompt"]["token_ids"] = fast(golden["prompt"]["rendered"], add_special_tokens=False)["input_ids"]
    golden["decoded"] = [{"token_ids": ids, "text": fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)}
                         for ids in ([case["token_ids"] for case in golden["texts"] if case["token_ids"]][::4])]
    write(folder / "golden.json", golden)


def write_gguf(path, metadata):
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path, value):
    lines = json.dumps(value, ensure_ascii=True)
    # One case a line, so that a change is read as one.
    path.write_text(lines.replace('{"text":', '\n{"text":').replace('{"system":', '\n{"system":') + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("smollm2", "gemma", "gemma_folder"):
        parser.add_argument(name, type=pathlib.Path)
    paths = parser.parse_args()
    write_smollm2(paths.smollm2.resolve())
    write_gemma(paths.gemma.resolve(), paths.gemma_folder)
    write_byte_level("llama-bpe", "{1,3}", None, True, "<|begin_of_text|>",
                     [("<|begin_of_text|>", True), ("<|eot_id|>", True), ("<|start_header_id|>", True)])
    write_byte_level("qwen2", "", normalizers.NFC(), False, None,
                     [("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False)])
    write_sentence_piece("llama", only_first=False)
    write_sentence_piece("mistral", only_first=True)


if __name__ == "__main__":
    main()
