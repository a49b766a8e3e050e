"""dedup.py against theory, against brute force, and within its memory."""

from __future__ import annotations

from settings import UserError

import errno
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dedup
from dedup import DUPLICATE, EXACT, NEAR, MinHash, digest, find_duplicates

SHARED = Path(os.environ.get("CRIA_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
RECORD = np.dtype([("tokens", "<u4"), ("digest", "V16"), ("source", "<u2")])  # the digest is one field among others
SMALL = dict(permutations=16, bands=8, threshold=0.5)


def text_of(rng: random.Random, length: int) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(length))


def substituted(text: str, rng: random.Random, share: float = 0.05) -> str:
    characters = list(text)
    for at in rng.sample(range(len(text)), round(len(text) * share)):
        characters[at] = text_of(rng, 1)
    return "".join(characters)


def write(folder, digests, signatures=None):
    """The two files of a spool: digests [N] of 16 bytes, signatures [N, K] uint32."""
    records = np.zeros(len(digests), RECORD)
    records["digest"] = np.array(digests, "V16") if len(digests) else np.empty(0, "V16")
    records.tofile(folder / "documents")
    if signatures is not None:
        np.asarray(signatures, "<u4").tofile(folder / "signatures")


def search(folder, *, near=True, **settings) -> list[tuple[int, int, int]]:
    out = folder / "out"
    find_duplicates(folder / "documents", folder / "signatures" if near else None, out, record=RECORD, **settings)
    assert sorted(os.listdir(folder)) == sorted(["documents", "out", *(["signatures"] if near else [])])
    return np.fromfile(out, DUPLICATE).tolist()


def search_texts(folder, texts, minhash=None, **settings):
    minhash = minhash or MinHash()
    write(folder, [digest(text) for text in texts], [minhash.signature(text) for text in texts])
    return search(folder, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# One document


def test_digest_sees_letters_and_digits_only():
    same = ["春眠不觉晓，处处闻啼鸟。Ab1", "  春眠不觉晓\n处处闻_啼鸟 aB1!", "春眠不觉晓处处闻啼鸟ab1"]
    assert len({digest(text) for text in same}) == 1
    assert len({digest(text) for text in ["春眠不觉晓", "春眠不觉晓2", "眠春不觉晓", "。", "，", "_", ""]}) == 7
    assert digest("春眠，A_1").hex() == "bdf46ba823e112b2ac4e4cd993d1ce02"
    assert len(digest("half of a pair: \ud83d")) == len(digest("\ud83d")) == 16


def test_signature_is_part_of_the_format():
    """A spool written last year is read today: the numbers must never change, on any machine."""
    signature = MinHash(ngram=3, permutations=4, min_chars=5).signature("春眠不觉晓，处处闻啼鸟。")
    assert signature.dtype == np.uint32
    assert signature.tolist() == [1699225527, 89633142, 286024795, 495460328]


def test_signature_is_the_minimum_over_all_ngrams_across_blocks():
    """Against the formula in Python's own integers, on a text longer than two blocks."""
    minhash, text = MinHash(ngram=3, permutations=3, min_chars=5), text_of(random.Random(1), 2 * MinHash.BLOCK + 7)
    expected = [2**32] * 3
    for at in range(len(text) - 2):
        value = 0
        for character in text[at : at + 3]:
            value = (value * 0x9E3779B97F4A7C15 + ord(character)) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            value = (value ^ value >> shift) * factor % 2**64
        lines = zip(minhash.a.ravel().tolist(), minhash.b.ravel().tolist())
        expected = [min(old, (a * (value >> 32) + b) % 2**32) for old, (a, b) in zip(expected, lines)]
    assert minhash.signature(text).tolist() == expected


def test_signature_of_short_texts_and_small_ngrams():
    minhash = MinHash(ngram=3, min_chars=5)
    assert (minhash.signature("春眠，不觉。") == dedup.NEVER).all() and (minhash.signature("") == dedup.NEVER).all()
    assert (minhash.signature("春眠，不觉晓") != dedup.NEVER).any()
    assert minhash.signature("春眠不觉晓AB").tolist() == minhash.signature("春眠，不觉晓 a_b!").tolist()
    with pytest.raises(UserError, match="n-grams of 6"):
        MinHash(ngram=6, min_chars=5)


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_estimate_is_as_exact_as_theory_says(similarity):
    """Pairs of texts that share a beginning: unbiased, with the variance of K independent draws."""
    rng, minhash, errors, variances = random.Random(similarity), MinHash(), [], []
    for _ in range(600):
        length = rng.randrange(100, 400)
        own = round(length * (1 - similarity) / (1 + similarity))
        start = text_of(rng, length - own)
        one, other = start + text_of(rng, own), start + text_of(rng, own)
        sets = [{text[at : at + minhash.ngram] for at in range(length - minhash.ngram + 1)} for text in (one, other)]
        true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        errors.append((minhash.signature(one) == minhash.signature(other)).mean() - true)
        variances.append(true * (1 - true) / minhash.permutations)
    expected = np.sqrt(np.mean(variances))
    assert abs(np.mean(errors)) < 4 * expected / np.sqrt(len(errors))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(expected, rel=0.15)


# ----------------------------------------------------------------------------------------------------------------------
# Planted copies


def test_planted_copies_are_found_and_near_misses_kept(tmp_path):
    """Originals, 5% cut out, 5% substituted, exact copies, and letters from one template, half of which is fixed."""
    rng = random.Random(0)
    originals = [text_of(rng, rng.randrange(60, 600)) for _ in range(150)]
    cut = [text[: len(text) // 2] + text[len(text) // 2 + len(text) // 20 :] for text in originals]
    changed = [substituted(text, rng) for text in originals]
    exact = ["《" + "，".join(text) + "》" for text in originals[:50]]
    pieces = [[text_of(rng, 12) for _ in range(10)] for _ in range(15)]
    letters = ["".join(piece + text_of(rng, 12) for piece in rng.choice(pieces)) for _ in range(150)]
    found = search_texts(tmp_path, originals + cut + changed + exact + letters)
    kinds = {document: (original, kind) for document, original, kind in found}
    assert [kinds.get(450 + at) for at in range(50)] == [(at, EXACT) for at in range(50)]
    assert sum(kinds.get(150 + at) == (at, NEAR) for at in range(150)) == 150
    assert sum(kinds.get(300 + at, (None,))[0] in (at, 150 + at) for at in range(150)) >= 0.95 * 150
    right = sum(original in (document % 150, document % 150 + 150) for document, original, kind in found if kind == NEAR)
    near = sum(kind == NEAR for _, _, kind in found)
    assert right >= 0.98 * near and not any(document < 150 for document in kinds)


def test_the_earliest_stays_and_rows_are_in_order(tmp_path):
    rng = random.Random(3)
    one, other = text_of(rng, 300), text_of(rng, 300)
    near_one = one[:290] + text_of(rng, 10)
    texts = [near_one, other, one, one + "。", other, near_one, text_of(rng, 300)]
    assert search_texts(tmp_path, texts) == [(2, 0, NEAR), (3, 2, EXACT), (4, 1, EXACT), (5, 0, EXACT)]
    assert search_texts(tmp_path, texts[::-1]) == [(3, 1, NEAR), (4, 3, EXACT), (5, 2, EXACT), (6, 1, EXACT)]


def test_no_chains(tmp_path):
    """A ~ B and B ~ C drop B and C, C because of B. Where A and B differ, C still goes because of B alone."""
    signatures = np.tile(np.arange(16), (3, 1))
    signatures[1:, 8:] += 100
    signatures[2, :8] += 200
    write(tmp_path, [bytes([at]) * 16 for at in range(3)], signatures)
    assert search(tmp_path, **SMALL) == [(1, 0, NEAR), (2, 1, NEAR)]
    signatures[1, 0] += 7  # now A and B agree in 7 of 16 only
    write(tmp_path, [bytes([at]) * 16 for at in range(3)], signatures)
    assert search(tmp_path, **SMALL) == [(2, 1, NEAR)]


def test_short_texts_are_never_near_duplicates(tmp_path):
    texts = ["春眠不觉晓" + str(at) for at in range(20)] + ["春眠不觉晓，7", "。", "，", "。"]
    assert search_texts(tmp_path, texts) == [(20, 7, EXACT), (23, 21, EXACT)]


def test_empty(tmp_path):
    write(tmp_path, [])
    assert search(tmp_path, near=False) == []
    write(tmp_path, [], np.empty((0, 128)))
    assert search(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# Against brute force


def brute_force(digests, signatures, bands, threshold, **_) -> list[tuple[int, int, int]]:
    """The definition: exact copies first; then pairs in every group of equal bands, first-of-group and one-before."""
    found = {}
    for document, one in enumerate(digests):
        for original in range(document):
            if digests[original] == one:
                found[document] = (original, EXACT)
                break
    rest = [at for at, row in enumerate(signatures or []) if at not in found and any(n != dedup.NEVER for n in row)]
    rows = len(signatures[0]) // bands if signatures else 0
    for band in range(bands):
        groups = {}
        for at in rest:
            groups.setdefault(tuple(signatures[at][band * rows : (band + 1) * rows]), []).append(at)
        for group in groups.values():
            for place, document in enumerate(group[1:], 1):
                for original in (group[0], group[place - 1]):
                    equal = sum(x == y for x, y in zip(signatures[document], signatures[original]))
                    if equal >= threshold * len(signatures[0]):
                        found[document] = min(found.get(document, (original, NEAR)), (original, NEAR))
    return [(document, *found[document]) for document in sorted(found)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=40), st.sampled_from([dedup.LEAST_MEMORY, 1 << 24]))
def test_exact_copies_are_those_of_brute_force(tmp_path_factory, numbers, memory):
    folder = tmp_path_factory.mktemp("exact")
    digests = [digest(str(number)) for number in numbers]
    write(folder, digests)
    assert search(folder, near=False, memory=memory) == brute_force(digests, None, 1, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_near_copies_are_those_of_brute_force(tmp_path_factory, data):
    """Signatures from few different numbers, so that bands collide all the time, in groups of every size."""
    rows = st.lists(st.sampled_from([1, 2, 3, dedup.NEVER]), min_size=8, max_size=8)
    signatures = data.draw(st.lists(rows | st.just([dedup.NEVER] * 8), max_size=30))
    numbers = data.draw(st.lists(st.integers(0, 60), min_size=len(signatures), max_size=len(signatures)))
    settings = dict(bands=4, threshold=data.draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])))
    folder, digests = tmp_path_factory.mktemp("near"), [digest(str(number)) for number in numbers]
    write(folder, digests, np.array(signatures, "<u4").reshape(-1, 8))
    assert search(folder, permutations=8, **settings) == brute_force(digests, signatures, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# On disk


def corpus(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A tenth of the documents is one page again and again, exact or with one number changed; a third are copies."""
    rng = np.random.default_rng(size)
    digests, signatures = rng.integers(0, 1 << 63, (size, 2)), rng.integers(0, 1 << 32, (size, 16), dtype=np.uint32)
    for source, target in zip(rng.integers(0, size, size // 3), rng.integers(0, size, size // 3)):
        signatures[target], signatures[target, target % 16] = signatures[source], target
    page = rng.random(size) < 0.1
    signatures[page], digests[page & (rng.random(size) < 0.5)] = 7, 7
    return digests.astype("<u8").view("V16").ravel(), signatures


def test_the_result_does_not_depend_on_the_memory(tmp_path, monkeypatch):
    digests, signatures = corpus(4000)
    write(tmp_path, digests, signatures)
    found = search(tmp_path, **SMALL)
    assert found == brute_force([bytes(one) for one in digests], signatures.tolist(), **SMALL)
    monkeypatch.setattr(dedup, "LEAST_MEMORY", 0)
    for memory in (1 << 15, 1 << 17, 1 << 20):
        assert search(tmp_path, memory=memory, **SMALL) == found


@pytest.mark.parametrize("memory", [1 << 15, 1 << 24])
def test_each_is_compared_with_the_one_before_it_in_the_band(tmp_path, monkeypatch, memory):
    """All share band 0, and each resembles only its neighbours, without another whole band: one row of every band.

    In little memory the group fills many blocks, so the last document of each must be carried over to the next.
    """
    monkeypatch.setattr(dedup, "LEAST_MEMORY", 0)
    signatures = np.random.default_rng(0).integers(0, 1 << 32, (1000, 8, 2), dtype=np.uint32)
    signatures[:, 0] = 7
    for at in range(1, len(signatures)):
        signatures[at, :, at % 2] = signatures[at - 1, :, at % 2]
    write(tmp_path, [digest(str(at)) for at in range(1000)], signatures)
    assert search(tmp_path, memory=memory, **SMALL) == [(at, at - 1, NEAR) for at in range(1, 1000)]


@pytest.mark.parametrize("size", [6000, 24000])
def test_memory_is_kept(tmp_path, size):
    write(tmp_path, *corpus(size))
    memory = 1 << 20
    tracemalloc.start()
    find_duplicates(tmp_path / "documents", tmp_path / "signatures", tmp_path / "out", record=RECORD, memory=memory, **SMALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert memory / 8 < peak <= memory < (tmp_path / "signatures").stat().st_size * 4


def test_progress_rises_to_one(tmp_path):
    write(tmp_path, *corpus(3000))
    for near in (False, True):
        told = []
        signatures = tmp_path / "signatures" if near else None
        find_duplicates(tmp_path / "documents", signatures, tmp_path / "out", record=RECORD, on_progress=told.append, **SMALL)
        assert told == sorted(told) and told[-1] == pytest.approx(1.0) and len(told) >= 3


@pytest.mark.parametrize("step", ["exact_copies", "candidates", "duplicates"])
def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, step):
    write(tmp_path, *corpus(500))
    (tmp_path / "out").write_text("an earlier result")
    original = getattr(dedup._Search, step)

    def full(*arguments):
        for _ in original(*arguments) if step == "duplicates" else [original(*arguments)]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dedup._Search, step, full)
    with pytest.raises(OSError) as error:
        search(tmp_path, **SMALL)
    assert error.value.errno == errno.ENOSPC
    assert sorted(os.listdir(tmp_path)) == ["documents", "out", "signatures"]
    assert (tmp_path / "out").read_text() == "an earlier result"


def test_what_a_killed_run_left_is_replaced(tmp_path):
    write(tmp_path, [b"a" * 16] * 2)
    (tmp_path / ".out.scratch").mkdir()
    (tmp_path / ".out.scratch" / "digests-0").write_bytes(b"\1" * 48)
    assert search(tmp_path, near=False) == [(1, 0, EXACT)]


def test_mistakes_are_named(tmp_path):
    write(tmp_path, *corpus(100))
    with pytest.raises(UserError, match="7 bands: needs a divisor of the 16"):
        search(tmp_path, permutations=16, bands=7)
    with pytest.raises(UserError, match="holds 50 rows for 100 documents"):
        search(tmp_path, permutations=32, bands=8)
    with pytest.raises(UserError, match="1,000 bytes of memory are too little for 100 documents; 1,048,576 are enough"):
        search(tmp_path, memory=1000, **SMALL)
    with open(tmp_path / "documents", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match="cut off"):
        search(tmp_path, **SMALL)


# ----------------------------------------------------------------------------------------------------------------------
# The real samples, where they are at hand


def test_real_statutes(tmp_path):
    """Of 166 statutes, only other versions of the same statute are near duplicates, and one is there twice."""
    files = sorted(SHARED.glob("pretrain/laws/**/*.md"), key=lambda path: path.stem)
    if not files:
        pytest.skip("the real samples are not here")
    texts = {path: path.read_text(encoding="utf-8").split("INFO END -->")[-1] for path in files}
    names = [path.stem for path, text in texts.items() if len(text) > 100]
    found = search_texts(tmp_path, [text for text in texts.values() if len(text) > 100])
    pairs = [(names[document], names[original], kind) for document, original, kind in found]
    assert [one for one, _, kind in pairs if kind == EXACT] == ["职业病防治法(2018-12-29)"]
    near = {one.split("(")[0]: other.split("(")[0] for one, other, kind in pairs if kind == NEAR}
    assert set(near) >= {"未成年人保护法", "农业技术推广法", "对外贸易法"} and all(one == other for one, other in near.items())
