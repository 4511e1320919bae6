"""llama.cpp as a peer: it has a model of equal size and generates the tokens it is timed for."""

import pytest

from seqmix.lab.bench.benchmark import Skip
from seqmix.lab.bench.llama_cpp import FORMATS, LlamaCpp
from seqmix.lab.bench.models import DecodeBenchmark, model_to_measure
from seqmix.lab.bench.peers import Size


def test_llama_cpp_is_unavailable_for_batches_and_lists_all_formats(settings):
    assert "one sequence" in LlamaCpp(settings(batch=2), Size(model_to_measure()), "F32", 4).unavailable_reason()
    names = [each.name for each in DecodeBenchmark(settings()).implementations()]
    assert set(FORMATS.values()) <= set(names)


@pytest.mark.parametrize("weights", FORMATS)
def test_llama_cpp_decodes_with_a_model_of_similar_size(settings, weights):
    size = Size(model_to_measure(None, ["model.d_model=128", "model.n_layers=2"]))
    llama = LlamaCpp(settings(), size, weights, 4)
    try:
        prepared = llama.prepared_call(16)
    except Skip as reason:
        pytest.skip(str(reason))
    prepared.call.run()
    llama.release()
    assert llama.parameters == pytest.approx(size.parameters, rel=0.04)
    assert 0 < prepared.moved_bytes - prepared.state_bytes < llama.file_bytes
