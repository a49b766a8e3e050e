"""How well dedup.py finds near copies: planted ones in real texts, with near misses beside them.

    python bench_dedup.py                            # needs samples in ../shared/data; writes docs/dedup.png, prints tables

Every base text gets two near copies: one with 5% of its characters changed in contiguous pieces (replaced, left out or put
in), one with 5% substituted at random positions. Near misses are two letters from one template with other fillings, and
all pairs of the amendments to the criminal law; two texts of one kind are unrelated, and so are two English ones, which
share more n-grams because there are fewer. Dated versions of one statute are shown apart: they are neither.
"""

from __future__ import annotations

from settings import UserError, command_line, flag

import itertools
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dedup
from tables import markdown_table

SHARED = Path(os.environ.get("CRIA_SHARED_DATA", Path(__file__).resolve().parent.parent / "shared/data"))
NGRAMS = (3, 4, 5, 7)
LENGTHS = (30, 50, 100, 200, 500, 2000, 1 << 30)  # bounds of the length classes, in letters and digits
FIXED = (0.7, 0.75, 0.8, 0.9)  # of letters that differ in little: shown apart
COPIES, MISSES = ("contiguous", "substituted"), ("template", "amendments", "unrelated", "English")


@dataclass(frozen=True)
class Config:
    samples: Path = flag(SHARED, "directory with pretrain/ and sft/")
    bases: int = flag(2400, "base texts, in equal parts of each kind")
    figure: Path = flag(Path("docs/dedup.png"), "the figure to write")
    seed: int = flag(0, "of all random choices")


def real_texts(samples: Path, rng: random.Random, each: int) -> dict[str, list[str]]:
    """Texts of four kinds, laws and novels cut to lengths that are spread evenly over the orders of magnitude."""
    folder = samples / "pretrain"
    laws = list({name.split("(")[0]: text for name, text in statutes(samples).items()}.values())  # the newest version
    novels = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("niutrans-classics/**/*.txt"))]
    poems = [poem for path in sorted(folder.glob("chinese-poetry/全唐诗/*.json")) for poem in json.loads(path.read_text("utf-8"))]
    answers = json.loads((samples / "sft/ruozhiba_qa2449_gpt4t.json").read_text("utf-8"))
    texts = {"laws": cut(laws, rng), "classics": cut(novels, rng), "poems": ["\n".join(poem["paragraphs"]) for poem in poems],
             "answers": [answer["output"] for answer in answers]}  # fmt: skip
    texts = {kind: list({dedup.digest(text): text for text in some if len(text) >= LENGTHS[0]}.values())
             for kind, some in texts.items()}  # fmt: skip
    return {kind: rng.sample(some, min(each, len(some))) for kind, some in texts.items()}


def statutes(samples: Path) -> dict[str, str]:
    """Name and date -> text, without the header, sorted."""
    files = sorted((samples / "pretrain/laws").glob("**/*.md"), key=lambda path: path.stem)
    texts = {path.stem: path.read_text(encoding="utf-8").split("INFO END -->")[-1] for path in files}
    return {name: text for name, text in texts.items() if len(text) > 100}


def cut(texts: list[str], rng: random.Random, shortest=1.6, longest=3.8) -> list[str]:
    """Pieces from 10^shortest to 10^longest characters, all orders of magnitude alike."""
    pieces = []
    for text in texts:
        start = 0
        while start < len(text):
            length = int(10 ** rng.uniform(shortest, longest))
            pieces.append(text[start : start + length])
            start += length
    return pieces


def contiguous_copy(text: str, other: str, rng: random.Random) -> str:
    """5% of the characters replaced with others, left out, or put in from another text, in clauses of about 20."""
    pieces = max(1, round(len(text) * 0.05 / 20))
    size = max(1, round(len(text) * 0.05 / pieces))
    for _ in range(pieces):
        at, source = rng.randrange(len(text) - size + 1), rng.randrange(max(1, len(other) - size))
        new, gone = rng.choice(((size, size), (0, size), (size, 0)))
        text = text[:at] + other[source : source + new] + text[at + gone :]
    return text


def substituted_copy(text: str, other: str, rng: random.Random) -> str:
    """5% of the letters and digits, at random positions, replaced with random ones of another text."""
    characters, letters = list(text), re.findall(r"\w", other)
    places = [at for at, character in enumerate(text) if character.isalnum()]
    for at in rng.sample(places, max(1, round(len(places) * 0.05))):
        characters[at] = rng.choice([letter for letter in letters if letter != text[at]])
    return "".join(characters)


def letters(words: list[str], rng: random.Random, share: float) -> tuple[str, str]:
    """Two texts from one template: `share` of the characters is fixed, in pieces of 5 to 40; the rest differs."""
    length, one, other = int(10 ** rng.uniform(1.5, 3.3)), "", ""

    def words_of(size):
        text = rng.choice(words)
        at = rng.randrange(max(1, len(text) - size))
        return text[at : at + size]

    while len(one) < length:
        fixed = rng.randint(5, 40)
        filling = max(1, round(fixed * (1 - share) / share))
        piece = words_of(fixed)
        one, other = one + piece + words_of(filling), other + piece + words_of(filling)
    return one, other


def jaccard(one: str, other: str, ngram: int) -> float:
    one, other = ({text[at : at + ngram] for at in range(len(text) - ngram + 1)} for text in map(dedup.normalised, (one, other)))
    return len(one & other) / max(1, len(one | other))


def planted(config: Config) -> dict[str, list[tuple[str, str]]]:
    """Pairs of texts by kind."""
    rng = random.Random(config.seed)
    texts = real_texts(config.samples, rng, config.bases // 4)
    pairs = {kind: [] for kind in (*COPIES, *MISSES, "versions")}
    for some in texts.values():
        for text in some:
            other = rng.choice([one for one in rng.sample(some, 2) if one is not text])
            pairs["contiguous"].append((text, contiguous_copy(text, other, rng)))
            pairs["substituted"].append((text, substituted_copy(text, other, rng)))
            pairs["unrelated"].append((text, other))
    words = [dedup.normalised(text) for text in texts["laws"] + texts["answers"] if len(text) > 100]
    pairs["template"] = [letters(words, rng, rng.uniform(0.35, 0.65)) for _ in range(config.bases // 2)]
    for share in FIXED:
        pairs[f"{share:.0%} fixed"] = [letters(words, rng, share) for _ in range(config.bases // 12)]
    lines = (config.samples / "pretrain/format_samples/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    english = [json.loads(line)["text"] for line in lines]
    for _ in range(config.bases // 10):
        rng.shuffle(english)
        size = int(10 ** rng.uniform(2.5, 5))  # of several pages in a row
        pairs["English"].append(("".join(english[::2])[:size], "".join(english[1::2])[:size]))
    laws = statutes(config.samples)
    pairs["amendments"] = list(itertools.combinations([text for name, text in laws.items() if "修正案" in name], 2))
    for (name, text), (next_name, next_text) in itertools.pairwise(laws.items()):
        if "(" in name and name.split("(")[0] == next_name.split("(")[0]:
            pairs["versions"].append((text, next_text))
    return pairs


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measured(pairs: dict[str, list[tuple[str, str]]], ngram: int) -> dict[str, np.ndarray]:
    """Per kind [pairs, 3]: Jaccard index, estimate (0 where no band agrees), letters and digits of the shorter text."""
    minhash, result = dedup.MinHash(ngram, min_chars=ngram), {}
    for kind, some in pairs.items():
        rows = []
        for one, other in some:
            signatures = np.stack([minhash.signature(one), minhash.signature(other)])
            bands = dedup.band_hashes(signatures, dedup.BANDS)
            estimate = (signatures[0] == signatures[1]).mean() if (bands[0] == bands[1]).any() else 0.0
            length = min(len(dedup.normalised(one)), len(dedup.normalised(other)))
            rows.append((jaccard(one, other, ngram), estimate, length))
        result[kind] = np.array(rows)
    return result


def shares(rows: dict[str, np.ndarray], threshold: float, least: int = dedup.MIN_CHARS) -> tuple[float, float, float, float]:
    """Recall of the two kinds of copies, precision, and the share of template pairs that are taken for copies."""
    long = {kind: some[some[:, 2] >= least, 1] >= threshold for kind, some in rows.items()}
    found, wrong = (sum(long[kind].sum() for kind in kinds) for kinds in (COPIES, MISSES))
    return (*(long[kind].mean() for kind in COPIES), found / max(1, found + wrong), long["template"].mean())


def end_to_end(pairs: dict[str, list[tuple[str, str]]]) -> Counter:
    """find_duplicates on all first texts, then all copies and second letters. Counts (kind, what became of it)."""
    minhash, counts = dedup.MinHash(), Counter()
    kinds = [*COPIES, "template"]
    firsts = {text: None for kind in kinds for text, _ in pairs[kind]}
    texts = [*firsts, *(other for kind in kinds for _, other in pairs[kind])]
    numbers = {text: number for number, text in enumerate(firsts)}
    wanted = [None] * len(firsts) + [(kind, numbers[one]) for kind in kinds for one, _ in pairs[kind]]
    with tempfile.TemporaryDirectory() as folder:
        documents, signatures, out = (Path(folder, name) for name in ("documents", "signatures", "out"))
        documents.write_bytes(b"".join(map(dedup.digest, texts)))
        np.stack([minhash.signature(text) for text in texts]).tofile(signatures)
        dedup.find_duplicates(documents, signatures, out, record=np.dtype([("digest", "V16")]))
        found = {int(row["document"]): row for row in np.fromfile(out, dedup.DUPLICATE)}
    for number, (text, pair) in enumerate(zip(texts, wanted)):
        if min(len(dedup.normalised(one)) for one in (text, texts[pair[1]] if pair else text)) >= dedup.MIN_CHARS:
            kind, original = pair or ("first texts", None)
            row = found.get(number)
            counts[kind, "kept" if row is None else "found" if row["original"] == original else "of another text"] += 1
    return counts


def draw(results: dict[int, dict[str, np.ndarray]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2))
    for kind in (*COPIES, *MISSES):
        rows = results[dedup.NGRAM][kind]
        values = rows[rows[:, 2] >= dedup.MIN_CHARS, 0]
        left.hist(values, np.linspace(0, 1, 61), weights=np.full(len(values), 1 / len(values)), alpha=0.6, label=kind)
    left.set(title=f"Jaccard index of {dedup.NGRAM}-grams", xlabel="J", ylabel="share of the pairs of a kind", ylim=(0, 0.3))
    thresholds = np.linspace(0.2, 0.9, 71)
    for ngram, rows in results.items():
        values = np.array([shares(rows, threshold) for threshold in thresholds])
        line = middle.plot(thresholds, values[:, 1], label=f"n = {ngram}")[0]
        middle.plot(thresholds, values[:, 2], "--", color=line.get_color())
    middle.set(title="recall of substituted copies (—), precision (- -)", xlabel="threshold", ylim=(0.85, 1.005))
    index, rows = np.linspace(0, 1, 201), dedup.PERMUTATIONS // dedup.BANDS
    right.plot(index, 1 - (1 - index**rows) ** dedup.BANDS, label=f"{dedup.BANDS} bands of {rows}: theory")
    pairs = np.concatenate(list(results[dedup.NGRAM].values()))
    bins = np.digitize(pairs[:, 0], np.linspace(0, 1, 41))
    shown = [bins == number for number in range(1, 42) if (bins == number).sum() >= 20]
    right.plot([pairs[some, 0].mean() for some in shown], [(pairs[some, 1] > 0).mean() for some in shown], "o", label="measured")
    right.plot([pairs[some, 0].mean() for some in shown], [(pairs[some, 1] >= dedup.THRESHOLD).mean() for some in shown], "s-",
               label=f"and the estimate is at least {dedup.THRESHOLD}")  # fmt: skip
    right.set(title="probability of being found", xlabel="J")
    for axes in (left, middle, right):
        axes.axvline(dedup.THRESHOLD, color="grey", linewidth=0.8)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(config: Config) -> None:
    if not (config.samples / "pretrain/laws").is_dir():
        raise UserError(f"{config.samples} holds no pretrain/laws: --samples needs the folder of the real samples")
    pairs = planted(config)
    results = {ngram: measured(pairs, ngram) for ngram in NGRAMS}

    def table(title, header, rows):
        print(f"\n{title}\n", *markdown_table(header, rows, right=range(1, len(header))), sep="\n")

    table("Jaccard index: 1%, 50% and 99% of the pairs lie below", ("pairs", "number", *(f"n = {ngram}" for ngram in NGRAMS)),
          [(kind, len(some), *(" / ".join(f"{value:.2f}" for value in np.quantile(results[ngram][kind][:, 0], (0.01, 0.5, 0.99)))
                               for ngram in NGRAMS)) for kind, some in pairs.items()])  # fmt: skip
    table(f"Texts of at least {dedup.MIN_CHARS} letters and digits",
          ("n, threshold", *(f"recall, {kind}" for kind in COPIES), "precision", "templates lost", "English lost"),
          [(f"{ngram}, {threshold}", *(f"{share:.1%}" for share in shares(rows, threshold)),
            f"{(rows['English'][:, 1] >= threshold).mean():.1%}")
           for ngram, rows in results.items() for threshold in (0.4, 0.45, 0.5, 0.55, 0.6)])  # fmt: skip
    chosen = results[dedup.NGRAM]
    table("Shown apart: found at the defaults", ("pairs", "found", "of"),
          [(kind, f"{(rows[:, 1] >= dedup.THRESHOLD).mean():.0%}", len(rows)) for kind, rows in chosen.items()
           if kind not in (*COPIES, *MISSES)])  # fmt: skip
    lengths = []
    for least, most in itertools.pairwise(LENGTHS):
        cells = []
        for kind in (*COPIES, "template"):
            rows = chosen[kind]
            rows = rows[(rows[:, 2] >= least) & (rows[:, 2] < most)]
            cells += [f"{(rows[:, 1] >= dedup.THRESHOLD).mean():.1%} of {len(rows)}" if len(rows) >= 10 else "-"]
        lengths.append((f"{least} to {most - 1}" if most < 1 << 30 else f"{least} and more", *cells))
    table("Pairs found, by length", ("letters and digits", *COPIES, "template"), lengths)
    table("find_duplicates", ("text", "what became of it", "texts"), [(*key, count) for key, count in sorted(end_to_end(pairs).items())])
    texts = [text for text, _ in pairs["contiguous"]]
    size = sum(len(text.encode()) for text in texts) / 1e6
    for name, function in (("digest", dedup.digest), ("signature", dedup.MinHash().signature)):
        start = time.process_time()
        for text in texts:
            function(text)
        print(f"{name}: {size / (time.process_time() - start):.0f} MB/s of UTF-8, {size * 1e6 / len(texts):.0f} bytes per text")
    draw(results, config.figure)


if __name__ == "__main__":
    command_line(main, Config, description=__doc__)
