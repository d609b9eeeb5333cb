"""What is decided from the device and the configuration: precision, and what is compiled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from brain_to_text.model.device import allow_tf32, autocast_dtype, compiler, gru_dtype
from support.training_examples import CPU, small_config

CUDA = torch.device("cuda")


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch):
    """capability(7, 5): CUDA devices are there, and of that compute capability."""

    def fake(major: int, minor: int) -> None:
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return fake


@pytest.mark.parametrize(
    ("chip", "expected"),
    [
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4: has no bfloat16 units, though torch can emulate them
        ((8, 0), torch.bfloat16),  # A100
        ((8, 6), torch.bfloat16),  # A10G
        ((9, 0), torch.bfloat16),  # H100
    ],
)
def test_auto_is_bfloat16_where_the_chip_has_it(chip, expected, capability) -> None:
    capability(*chip)
    assert autocast_dtype(small_config(), CUDA) == expected


@pytest.mark.parametrize(
    ("settings", "on_gpu", "on_cpu"),
    [
        ({"use_amp": False}, None, None),
        ({"use_amp": False, "amp_dtype": "bfloat16"}, None, None),
        ({"amp_dtype": "float16"}, torch.float16, None),
        ({"amp_dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"amp_dtype": "auto"}, torch.bfloat16, None),
    ],
)
def test_what_was_asked_for_is_taken(settings, on_gpu, on_cpu, capability) -> None:
    capability(9, 0)
    assert autocast_dtype(small_config(**settings), CUDA) == on_gpu
    assert autocast_dtype(small_config(**settings), CPU) == on_cpu


def test_a_gru_is_given_bfloat16_under_a_gpus_bfloat16_autocast_alone(monkeypatch) -> None:
    assert gru_dtype(CUDA) is None, "autocast is off"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (torch.float16, None)):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind, dtype=dtype: dtype)
        assert gru_dtype(CUDA) == expected
        assert gru_dtype(CPU) is None


def test_tf32_is_allowed_or_forbidden_in_products_and_in_cudnn() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            allow_tf32(allowed)
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
            assert torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_compiling_is_for_gpus_unless_it_is_asked_for() -> None:
    with torch._dynamo.config.patch(suppress_errors=False):
        assert compiler(small_config(), CPU) is None
        assert compiler(small_config(compile="false"), CUDA) is None
        assert compiler(small_config(compile="true"), CPU) is not None
        assert not torch._dynamo.config.suppress_errors, "who asks for it wants to know"
        assert compiler(small_config(), CUDA) is not None
        assert torch._dynamo.config.suppress_errors


def test_what_is_compiled_has_dynamic_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no length of trials compiles again; the graphs are counted, no code is generated."""
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda part, **options: real(part, backend="eager", **options)
    )
    compile_part = compiler(small_config(compile="true"), CPU)
    assert compile_part is not None
    doubled = compile_part(lambda x: 2 * x)
    torch._dynamo.utils.counters.clear()
    for length in (5, 9, 17, 33):
        assert torch.equal(doubled(torch.ones(length, 3)), torch.full((length, 3), 2.0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
