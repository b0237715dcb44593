"""What a token of Llama costs: bytes counted by hand, published figures, and the laws of a floor."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtools.llm import decode
from qtools.llm.decode import Bits
from qtools.npu import roofline, soc
from qtools.npu.roofline import PRECISIONS
from qtools.suite.results import ROOT

FIT = json.loads((ROOT / "data/results/measured/07_fit.json").read_text())
S24 = soc.rates("sm8650", "w4a16")


def test_llama_reads_6_607e9_weights_for_a_token():
    layers = decode.layers(decode.LLAMA2_7B, 1, 1024)
    weights = sum(layer.weights for layer in layers)
    assert weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000 == 6_607_077_376
    assert sum(layer.macs for layer in layers) == weights + 32 * 2 * 1024 * 4096
    cache = sum(layer.cache for layer in layers if layer.op == "attention")
    assert cache == 2 * 32 * 1024 * 4096  # keys and values, 8 bits


@pytest.mark.parametrize(
    ("bits", "least"),
    [(Bits(8, 8, 8, 8), 132.1), (Bits(4, 4, 8, 8), 67.4), (Bits(4, 4, 8, 8, 128), 69.5),
     (Bits(4, 8, 8, 8), 110.7)],
)  # fmt: skip
def test_what_a_token_takes_at_50_gigabytes_a_second(bits, least):
    read = decode.reads(decode.LLAMA2_7B, 1024, bits)
    assert 1e3 * (read.weights + read.scales) / 50e9 == pytest.approx(least, abs=0.11)


def test_llama_on_the_8_gen_3_without_being_fitted():
    first, token = decode.seconds(decode.LLAMA2_7B, S24, 1024, 1024)
    assert 1 / token == pytest.approx(12.85, rel=0.15) and first == pytest.approx(1.496, rel=0.2)
    assert 1 / token == pytest.approx(FIT["values"]["llama_tokens_per_s"])
    for entry in FIT["decoders"]:
        assert entry["tokens_per_s"] == pytest.approx(entry["published_tokens_per_s"], rel=0.2)


def test_longer_contexts_wider_weights_and_more_tokens_take_longer():
    def token(context=1024, bits=decode.W4A16, tokens=1):
        layers = decode.layers(decode.LLAMA2_7B, tokens, context, bits)
        return roofline.predict(layers, PRECISIONS["w4a16"], S24).seconds

    assert token() < token(4096) and token() < token(bits=Bits(8, 8, 8, 8)) and token() < token(tokens=128)
    assert token(4096, Bits(4, 4, 8, 4)) < token(4096) < token(4096, Bits(4, 4, 8, 16))
    with pytest.raises(ValueError, match="between 1 and the context of 8, got 9"):
        decode.layers(decode.LLAMA2_7B, 9, 8)


@given(context=st.integers(1, 8192), sequences=st.integers(1, 16), bits=st.sampled_from([4, 8, 16]))
def test_weights_are_read_once_for_all_sequences_and_a_cache_for_each(context, sequences, bits):
    one, many = (decode.reads(decode.LLAMA2_7B, context, Bits(4, 4, 8, bits), n) for n in (1, sequences))
    assert (many.weights, many.scales, many.cache) == (one.weights, one.scales, sequences * one.cache)
    assert one.cache == context * 2 * 32 * 4096 * bits / 8
    floor = decode.floor(decode.LLAMA2_7B, 50e9, context, Bits(4, 4, 8, bits), sequences)
    assert floor == pytest.approx(many.total / 50e9)


@pytest.mark.parametrize("soc_key", ["sm8550", "sm8650", "sm8750", "sc8380xp"])
def test_no_prediction_is_below_its_floor(soc_key):
    rates = soc.rates(soc_key, "w4a16")
    for context in (128, 1024, 4096):
        _, token = decode.seconds(decode.LLAMA2_7B, rates, context, 1024)
        assert token > decode.floor(decode.LLAMA2_7B, rates.bandwidth, context)


@pytest.mark.parametrize(("bits", "tokens"), [(Bits(4, 4, 8, 16), 5049), (Bits(8, 8, 8, 16), 9902)])
def test_half_the_cache_saves_22_percent_far_beyond_the_context_of_llama_2(bits, tokens):
    found = decode.cache_share(decode.LLAMA2_7B, 0.22, bits)
    assert found == pytest.approx(tokens, rel=1e-3)
    halved = bits._replace(cache=bits.cache // 2)
    times = [decode.floor(decode.LLAMA2_7B, 1.0, round(found), each) for each in (bits, halved)]
    assert 1 - times[1] / times[0] == pytest.approx(0.22, abs=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        decode.floor(decode.LLAMA2_7B, 0, 1024)
    with pytest.raises(ValueError, match="between none and half of the time"):
        decode.cache_share(decode.LLAMA2_7B, 0.5)
