"""Pooling against the dense matrix, and the file of examples."""

import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

from sae_persona.errors import FormatError
from sae_persona.features.pooled import POOLS, Pooled, pool, to_csr
from sae_persona.types import SparseLatents


def pooled(n: int = 6) -> Pooled:
    generator = np.random.default_rng(0)
    texts = np.array([f"naïve {i}" for i in range(n)])
    labels = generator.random((n, 2)).astype(np.float32)
    labels[0, 1] = np.nan
    return Pooled(
        personas=("honest", "pirate"),
        labels=labels,
        ids=texts,
        template=texts,
        domain=np.array([""] * n),
        author=texts,
        split=np.array(["train", "held_out"] * (n // 2)),
        dialogue=np.arange(n),
        n_answer_tokens=np.arange(1, n + 1),
        pools={name: sparse.random(n, 9, 0.3, "csr", np.float32, generator) for name in POOLS},
        dense={name: generator.random((n, 4)).astype(np.float32) for name in ("pre", "mean")},
        weights=generator.random((n, 2)).astype(np.float32),
        texts=np.array([f"é \n{'long ' * i}" for i in range(n)], dtype=object),
        position=np.arange(n) + 3,
        hard=np.arange(n) % 2 == 0,
        covariates=np.arange(n * 2.0).reshape(n, 2),
        covariate_names=("age", "größe"),
        sae="abc",
    )


def test_pools_are_those_of_the_dense_matrix():
    dense = np.random.default_rng(1).random((30, 7)).astype(np.float32)
    dense[dense < 0.7] = 0
    pre, spans = [2, 9, 29], [(3, 8), (10, 11), (12, 29)]
    pools = pool(sparse.csr_matrix(dense), pre, spans)
    np.testing.assert_array_equal(pools["pre"].toarray(), dense[pre])
    np.testing.assert_array_equal(pools["max"].toarray(), [dense[a:b].max(0) for a, b in spans])
    np.testing.assert_allclose(pools["mean"].toarray(), [dense[a:b].mean(0) for a, b in spans], rtol=1e-6)
    assert all(matrix.dtype == np.float32 and matrix.format == "csr" for matrix in pools.values())


def test_to_csr_stores_no_zeros_whichever_way_latents_come():
    latents = SparseLatents(torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([[4, 0], [2, 1]]))
    ragged = SparseLatents(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([4, 2, 1]), torch.tensor([0, 1, 3]))
    for form in (latents, ragged):
        matrix = to_csr(form, 5)
        np.testing.assert_array_equal(matrix.toarray(), latents.dense(5).numpy())
        assert matrix.nnz == 3
    assert latents.acts[0, 0] == 3, "the latents themselves are left alone"


def test_goes_through_a_file(tmp_path):
    before = pooled()
    before.save(tmp_path / "examples.h5")
    after = Pooled.load(tmp_path / "examples.h5")
    assert after.personas == before.personas and len(after) == 6 and after.n_latents == 9
    assert (after.covariate_names, after.sae) == (before.covariate_names, "abc")
    for name in (*("labels", "ids", "template", "domain", "author", "split", "dialogue", "n_answer_tokens"),
                 *("weights", "texts", "position", "answer", "hard", "covariates")):  # fmt: skip
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    for name in POOLS:
        np.testing.assert_array_equal(after.pools[name].toarray(), before.pools[name].toarray())
    for name, part in before.dense.items():
        np.testing.assert_array_equal(after.dense[name], part)


def test_a_bad_file_is_one_line(tmp_path):
    path = tmp_path / "examples.h5"
    with pytest.raises(FormatError, match="not a whole examples file"):
        Pooled.load(path)
    pooled().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="not a whole examples file") as caught:
        Pooled.load(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        del file["labels"]
    with pytest.raises(FormatError, match="labels"):
        Pooled.load(path)
    with h5py.File(path, "a") as file:
        file.attrs["format"] = 99
    with pytest.raises(FormatError, match="format 99, wanted examples format 2"):
        Pooled.load(path)


def test_a_nul_in_a_text_does_not_end_it(tmp_path):
    before = pooled()
    before.texts[2] = "one\0two"
    before.save(tmp_path / "examples.h5")
    assert Pooled.load(tmp_path / "examples.h5").texts[2] == "one␀two"


def test_what_no_row_says():
    n, empty = 3, sparse.csr_matrix((3, 2), dtype=np.float32)
    texts = dict.fromkeys(("ids", "template", "domain", "author", "split"), np.array([""] * n))
    made = Pooled(("a",), np.ones((n, 1)), dialogue=np.arange(n), n_answer_tokens=np.ones(n), pools={"pre": empty},
                  dense={}, **texts)  # fmt: skip
    assert made.weights.tolist() == [[1], [1], [1]] and made.texts.tolist() == [""] * 3 and not made.hard.any()
    assert made.covariates.shape == (3, 0) and made.sae == ""


def test_an_older_file_is_told_to_measure_again(tmp_path):
    pooled().save(tmp_path / "examples.h5")
    with h5py.File(tmp_path / "examples.h5", "a") as file:
        file.attrs["format"] = 1
    with pytest.raises(FormatError, match="holds examples format 1, wanted examples format 2: measure the run again"):
        Pooled.load(tmp_path / "examples.h5")
