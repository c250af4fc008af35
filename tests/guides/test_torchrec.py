"""The lines of docs/guides/torchrec.md give what TorchRec's collections of the full tables give."""

from __future__ import annotations

import pytest
import torch

import graphhash

try:
    import torchrec
except Exception as error:  # A missing package, or FBGEMM of another PyTorch release, whose libraries do not load.
    pytest.skip(f"no TorchRec that loads ({error!s:.80})", allow_module_level=True)

N_IDS, DIM = {"user": 40, "item": 60}, 64


def test_vectors_and_sums_are_those_of_the_collections(run_block):
    lengths = torch.tensor([1, 1, 1, 2, 0, 3])
    features = torchrec.KeyedJaggedTensor(list(N_IDS), torch.tensor([3, 39, 0, 7, 7, 59, 0, 1]), lengths=lengths)
    maps = {key: graphhash.double_map(n, 9, seed=0) for key, n in N_IDS.items()}
    names = run_block("torchrec.md", features=features, maps=maps)
    sizes = [(f"t_{key}", DIM, n, [key]) for key, n in N_IDS.items()]
    device = torch.device("cpu")
    full = torchrec.EmbeddingCollection(
        tables=[
            torchrec.EmbeddingConfig(name=t, embedding_dim=d, num_embeddings=n, feature_names=f) for t, d, n, f in sizes
        ],
        device=device,
    )
    bags = torchrec.EmbeddingBagCollection(
        tables=[
            torchrec.EmbeddingBagConfig(name=t, embedding_dim=d, num_embeddings=n, feature_names=f)
            for t, d, n, f in sizes
        ],
        device=device,
    )
    with torch.no_grad():
        for key in N_IDS:
            full.embeddings[f"t_{key}"].weight.copy_(names["layers"][key].weight)
            bags.embedding_bags[f"t_{key}"].weight.copy_(names["bags"][key].weight)
    expected, expected_sums = full(features), bags(features).to_dict()
    for key in N_IDS:
        torch.testing.assert_close(names["vectors"][key].values(), expected[key].values())
        assert torch.equal(names["vectors"][key].lengths(), expected[key].lengths())
        torch.testing.assert_close(names["sums"][key], expected_sums[key])
