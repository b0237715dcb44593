"""The cache against a quantizer written number by number; its bytes counted by hand; texts made with and without it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtools.llm.kv_cache import KVCache, Scheme, Store, pack, taps, unpack
from qtools.llm.llama import Llama, generate, load

SMALL = Path(__file__).resolve().parents[1] / "data/small_llama"
GRAINS = ("tensor", "token", "channel")
SOME = settings(max_examples=40, deadline=None)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small() -> Llama:
    return load(SMALL)


@pytest.fixture(scope="module")
def ids(small: Llama) -> torch.Tensor:
    text = (SMALL / "validation.txt").read_text(encoding="utf-8")
    return torch.tensor(small.tokenizer.encode(text[:3000]).ids)


def numbers(tokens: int, seed: int = 0, heads: int = 2, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 3 ** torch.randn(1, heads, 1, size, generator=generator)
    return torch.randn(1, heads, tokens, size, generator=generator) * spread


def by_hand(block: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Numbers that share a step, one after the other, in Python's arithmetic."""
    low, high, top = min(0.0, block.min()), max(0.0, block.max()), 2**bits - 1
    step = max(-low, high) / (top // 2) if symmetric else (high - low) / top
    step = float(np.float16(step)) or 1.0
    zero = (top + 1) // 2 if symmetric else round(-low / ((high - low) / top))
    stored = [min(max(round(float(x) / step) + zero, 0), top) for x in block.ravel()]
    return np.array([(code - zero) * step for code in stored]).reshape(block.shape)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("grain", GRAINS)
def test_what_is_stored_is_what_a_pencil_finds(grain: str, bits: int, symmetric: bool) -> None:
    x = numbers(13)
    found = Store(Scheme(bits, symmetric=symmetric, group=4), grain).append(x)[0].numpy()
    expected = x[0].double().numpy()
    if grain == "tensor":
        expected = by_hand(expected, bits, symmetric)
    elif grain == "token":
        expected = np.stack([[by_hand(row, bits, symmetric) for row in head] for head in expected])
    else:  # twelve tokens in three groups; the last one waits
        expected = expected.astype(np.float16).astype(float)
        for head, first, channel in np.ndindex(2, 3, 16):
            part = slice(4 * first, 4 * first + 4)
            expected[head, part, channel] = by_hand(expected[head, part, channel], bits, symmetric)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "grain", "expected"),
    [
        (Scheme(16), "token", 70 * 2 * 16 * 2),
        (Scheme(8), "token", 70 * 2 * (16 + 2 + 1)),  # codes, a step in half precision, a zero point
        (Scheme(4), "token", 70 * 2 * (8 + 2 + 1)),
        (Scheme(2, symmetric=True), "token", 70 * 2 * (4 + 2)),
        (Scheme(4), "tensor", 70 * 2 * 8 + 3),
        (Scheme(4, group=32), "channel", 2 * (64 * 8 + 2 * 16 * 3) + 6 * 2 * 16 * 2),  # six tokens wait
        (Scheme(2, group=35), "channel", 2 * (70 * 4 + 2 * 16 * 3)),
    ],
)
@pytest.mark.parametrize("steps", [1, 7, 70])
def test_bytes_are_counted_to_the_last_one(scheme: Scheme, grain: str, expected: int, steps: int) -> None:
    store = Store(scheme, grain)
    for part in numbers(70).split(steps, 2):
        store.append(part)
    assert (store.nbytes, store.length) == (expected, 70)


@SOME
@given(st.integers(0, 2**31), st.sampled_from((16, 8, 4, 2)), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_it_does_not_matter_in_which_portions_tokens_come(seed: int, bits: int, portions: list[int]) -> None:
    x = numbers(sum(portions), seed)
    for grain in ("token", "channel"):
        scheme = Scheme(bits, group=4)
        store = Store(scheme, grain)
        last = [store.append(part) for part in x.split(portions, 2)][-1]
        assert torch.equal(last, Store(scheme, grain).append(x))


@SOME
@given(st.integers(0, 2**31), st.sampled_from((8, 4, 2)), st.floats(1e-3, 100))
def test_no_number_moves_more_than_half_a_step(seed: int, bits: int, size: float) -> None:
    x = numbers(8, seed) * size
    found = Store(Scheme(bits), "token").append(x)
    step = (x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)) / (2**bits - 1)
    # Steps are rounded to half precision, and no finer than 2**-14; the zero point adds another half step at the ends.
    most = (step * (1 + 2**-10 * 2**bits)).clamp_min(2.0**-14)
    assert ((found - x).abs().amax(-1) <= most).all()


def test_later_tokens_are_clipped_to_the_range_of_the_prompt() -> None:
    store = Store(Scheme(8), "tensor")
    prompt = numbers(20)
    low, high = prompt.min(), prompt.max()
    store.append(prompt)
    step = (high - low) / 255
    found = store.append(torch.full((1, 2, 1, 16), 1e4))
    assert store.nbytes == 21 * 2 * 16 + 3
    assert abs(found[0, 0, -1, 0] - high) <= step and (found[:, :, :20] - prompt).abs().max() < step


@given(st.sampled_from((8, 4, 2)), st.integers(0, 2**31), st.integers(1, 9))
def test_packed_codes_come_back_and_take_their_bits(bits: int, seed: int, rows: int) -> None:
    codes = torch.randint(2**bits, (rows, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits), codes) and packed.numel() * 8 == codes.numel() * bits
    number = sum(int(code) << bits * i for i, code in enumerate(codes[0]))
    assert int.from_bytes(packed[0].numpy().tobytes(), "little") == number


def test_tokens_are_the_same_with_and_without_a_cache(small: Llama, ids: torch.Tensor) -> None:
    half, prompts, cache = Scheme(16), torch.stack([ids[:20], ids[200:220]]), KVCache(4, Scheme(16))
    assert torch.equal(generate(small, prompts, 60, cache), generate(small, prompts, 60, taps=taps(half, half)))
    assert cache.length == 79 and cache.nbytes == 4 * 2 * (2 * 2 * 79 * 32) * 2  # layers, k and v; numbers of 2 bytes
    # Against keys and values in float32, one text in twenty turns off where two tokens are as likely.
    assert torch.equal(generate(small, prompts[:1], 40, KVCache(4, half)), generate(small, prompts[:1], 40))


def test_a_cache_that_is_fed_bit_by_bit_gives_the_logits_of_the_whole_text(small: Llama, ids: torch.Tensor) -> None:
    text, cache = ids[None, :50], KVCache(4, Scheme(16))
    with torch.no_grad():
        found = torch.cat([small(part, cache=cache) for part in text.split((20, 1, 13, 16), 1)], 1)
        torch.testing.assert_close(found, small(text), rtol=0, atol=0.03)  # keys and values in half precision
        assert (small(text, cache=KVCache(4, Scheme(2))) - small(text)).abs().max() > 0.5


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, "channel", group=16), Scheme(4, "tensor", "tensor")])
def test_fake_quantizers_do_what_the_cache_does(small: Llama, ids: torch.Tensor, scheme: Scheme) -> None:
    with torch.no_grad():
        faked = small(ids[None, :60], taps(scheme, scheme))
        stored = small(ids[None, :60], cache=KVCache(4, scheme))
    torch.testing.assert_close(faked, stored)


def test_fewer_bits_cost_more_and_eight_cost_next_to_nothing(small: Llama, ids: torch.Tensor) -> None:
    with torch.no_grad():
        right = small(ids[None, :120])
        missed = [
            float((small(ids[None, :120], taps(Scheme(b), Scheme(b))) - right).square().mean()) for b in (8, 4, 2)
        ]
        keys = float((small(ids[None, :120], taps(Scheme(4), None)) - right).square().mean())
    assert missed[0] < missed[1] / 50 < missed[2] / 200
    assert 0 < keys < missed[1]


@pytest.mark.parametrize(
    "bad", [{"bits": 3}, {"bits": 4, "keys": "row"}, {"bits": 4, "values": ""}, {"bits": 4, "group": 0}]
)
def test_schemes_that_do_not_exist_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="a cache stores 16, 8, 4 or 2 bits"):
        Scheme(**bad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e5])
@pytest.mark.parametrize("bits", [16, 4])
def test_numbers_that_cannot_be_stored_are_refused(value: float, bits: int) -> None:
    with pytest.raises(ValueError, match="numbers up to 65504"):
        Store(Scheme(bits), "token").append(torch.full((1, 1, 2, 8), value))
    with pytest.raises(ValueError, match="whole bytes"):
        Store(Scheme(2), "token").append(torch.ones(1, 1, 2, 6))
