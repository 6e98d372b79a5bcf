"""Compile and export every head and norm, and compare with eager: run by the slow test of test_heads.py."""

import copy

import torch

from ncreg.frames import simplex_etf
from ncreg.heads import HEADS, ETFHead, NearestETFHead
from ncreg.norms import LastBatchNorm

MODULES = {name: (build(12, 6), 12) for name, build in HEADS.items()}
for structure, dim in [("grouped", 13), ("householder", 5), ("centre", 6)]:
    MODULES[structure] = ETFHead(dim, 6, structure=structure, permutation=[5, 0, 1, 2, 3, 4]), dim
MODULES["unnormalised"] = ETFHead(12, 6, normalize=False), 12
for gamma in ("vector", "scalar", "none"):
    MODULES[f"LastBatchNorm {gamma}"] = LastBatchNorm(12, gamma=gamma), 12


def gradient(module, features):
    """Output and input gradient of sin(module(features)).sum()."""
    features = features.clone().requires_grad_()
    out = module(features)
    return out.detach(), torch.autograd.grad(out.sin().sum(), features)[0]


for name, (module, dim) in MODULES.items():
    features = torch.randn(5, dim, generator=torch.Generator().manual_seed(0))
    eager = gradient(copy.deepcopy(module), features)
    compiled = gradient(torch.compile(copy.deepcopy(module), fullgraph=True), features)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, compiled, strict=True)), name
    print(name, "compiled: same")
    module.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (features,), dynamic_shapes=({0: batch},)).module()
    more = torch.cat([features, features + 1])
    assert torch.allclose(exported(more), module(more), atol=1e-5), name
    print(name, "exported: same")

overflown = LastBatchNorm(12).half()
features = 2000 * torch.randn(64, 12, generator=torch.Generator().manual_seed(0)).half()
torch.compile(overflown, fullgraph=True)(features)
assert not overflown.num_batches_tracked and overflown._entered is None
print("LastBatchNorm that overflows, compiled: one graph")

averaged = NearestETFHead(12, 6).eval()
compiled = torch.compile(averaged, fullgraph=True)
features = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
for turn in range(2):
    assert torch.allclose(compiled(features), averaged(features), atol=1e-5), turn
    averaged._buffers["weight"].lerp_(simplex_etf(6, 12, generator=torch.Generator().manual_seed(9)), 0.5)
lengths = averaged.weight.norm(dim=1)
assert torch.allclose(lengths, torch.ones(6), atol=1e-5) and averaged._buffers["weight"].norm(dim=1).max() < 0.99
assert torch.allclose(compiled(features), averaged(features), atol=1e-5)
print("an averaged frame, compiled: a simplex")
