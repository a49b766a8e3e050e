"""What the tests of the tokenizer rooms share: a text, conversations, and small, foreign and real tokenizers.

conftest.py makes the fixtures known to every test file; the rest is imported.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from pathlib import Path

import pytest

import tokenizer as tk
from sentencepiece_model import sentencepiece_bytes

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CRIA_SHARED_DATA", REPO.parent / "shared" / "data")) / "tokenizers"
REAL = ("chatglm2", "llama2", "minimind")
VOCAB_SIZE = 700
WORDS = "春眠不觉晓处闻啼鸟夜来风雨声花落知多少床前明月光疑是地上霜举头望低思故乡白日依山尽黄河入海流"

ENGLISH = "The quick brown fox jumps over the lazy dog, and the other dogs watch the fox: 12 times!\n"

NASTY = [
    "", " ", "  a b", "a  b ", "\n", "\n\n a\n", "\t", "\r\n", "\0", "a\0b", "e\u0301", "\u0301", "\u200b", "\ufeff",
    "\u3000", "ﬁ Ａ ㎡", "\u2585", "\ufffd", "龘龘😀👩‍👩‍👧", "1234567890", "<s>", "</s>", "<unk>", "<0x41>",
    "<|im_start|>user\n", "<|im_end|>",
    "[gMASK]sop", "[MASK]", "<|spare_0|>", " " * 40, "\ud7ff", "\U0010ffff",
]  # fmt: skip
CHAT = [
    {"role": "system", "content": "你是  助手。\n请回答"},
    {"role": "user", "content": "法国的首都是哪里？ x"},
    {"role": "assistant", "content": "巴黎。\n\n y "},
    {"role": "user", "content": " Hello  world"},
    {"role": "assistant", "content": " Hi there 12"},
]


def sample_text() -> str:
    """Some hundred lines of Chinese, English and digits, the same on every machine."""
    draw = random.Random(0)
    places = ["法国", "巴黎", "德国", "柏林", "日本", "东京", "中国", "北京"]
    lines = []
    for _ in range(600):
        a, b = draw.choice(places), draw.choice(places)
        lines.append(draw.choice([
            f"{a}的首都是{b}，人口{draw.randrange(10**6)}。", f"The capital of {a} is {b}: {draw.random():.3f}",
            f"问：{a}在哪里？  答：{a}在{b}的旁边。", "人之初，性本善。性相近，习相远。",
            "def main(x):\n\treturn [x ** 2]",
        ]))  # fmt: skip
    return "\n".join(lines) + "\n"


def poem(rng: random.Random, lines: int) -> str:
    return "\n".join("".join(rng.choices(WORDS, k=rng.choice((5, 7)))) + "。" for _ in range(lines))


@pytest.fixture(scope="session")
def ours_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("ours")
    (root / "corpus.txt").write_text(sample_text(), encoding="utf-8")
    tk.train([root / "corpus.txt"], VOCAB_SIZE, root / "tokenizer")
    return root / "tokenizer"


@pytest.fixture(scope="session")
def ours(ours_dir):
    return tk.load_tokenizer(ours_dir)


@pytest.fixture(scope="session")
def spaceless_dir(tmp_path_factory):
    """Trained on Chinese as it is printed: not one space in the text."""
    root = tmp_path_factory.mktemp("spaceless")
    (root / "corpus.txt").write_text(sample_text().replace(" ", ""), encoding="utf-8")
    tk.train([root / "corpus.txt"], 450, root / "tokenizer")
    return root / "tokenizer"


@pytest.fixture(scope="session")
def english_dir(tmp_path_factory):
    """A small Llama: English pieces, bytes for the rest, a space before every text."""
    root = tmp_path_factory.mktemp("english")
    (root / "corpus.txt").write_text(ENGLISH * 3, encoding="utf-8")
    trained = tk.train([root / "corpus.txt"], 360, root / "trained")
    pieces = [piece for piece in trained.model.pieces if "<|" not in piece[0]]
    data = sentencepiece_bytes(pieces, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.model").write_bytes(data)
    return root / "tokenizer"


@pytest.fixture(scope="session")
def extended_dir(english_dir, ours_dir, tmp_path_factory):
    """It with the Chinese pieces of ours, and two special tokens."""
    out = tmp_path_factory.mktemp("extended") / "out"
    tk.extend(english_dir, ours_dir, out, specials=("<|im_start|>", "<|im_end|>"))
    return out


@pytest.fixture(scope="session")
def english(english_dir):
    return tk.load_tokenizer(english_dir)


@pytest.fixture(scope="session")
def extended(extended_dir):
    return tk.load_tokenizer(extended_dir)


@pytest.fixture(scope="session")
def llama3_dir(tmp_path_factory):
    """A small tokenizer.json built like Llama-3's: byte-level BPE, BOS in the post-processor."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    directory = tmp_path_factory.mktemp("llama3")
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=names, show_progress=False
    )
    backend.train_from_iterator(sample_text().split("\n"), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[(names[0], backend.token_to_id(names[0]))]
    )
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": {"content": names[4]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="session", params=["ours", "spaceless", "llama3", *REAL])
def any_tokenizer(request):
    if request.param in REAL:
        return real(request.param)
    return tk.load_tokenizer(request.getfixturevalue(f"{request.param}_dir"))


@functools.cache
def real(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real {name} tokenizer is not here")
    if name == "minimind":
        pytest.importorskip("tokenizers")
    return tk.load_tokenizer(SHARED / name)


def messages(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def copy_with_config(source: Path, target: Path, **changes) -> Path:
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return target


FOREIGN = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


def parity_texts():
    draw = random.Random(1)
    mixed = ["".join(draw.choices(" ab\n，。的1好国", k=draw.randrange(1, 30))) for _ in range(400)]
    lines = sample_text().split("\n")[:200]
    # transformers maps special-token text to special tokens; we do not, so such texts are left out here.
    return mixed + lines + [text for text in NASTY if not any(c in text for c in "<[")]
