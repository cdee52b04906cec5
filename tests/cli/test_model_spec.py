import json
import sys
from pathlib import Path

import pytest
import torch

from pipecompile.cli.model_spec import load
from pipecompile.errors import InputError

GOOD = """
import torch
from torch import nn

def kwargs():
    return nn.Linear(3, 2), {"input": torch.ones(4, 3)}

def args():
    return nn.Linear(3, 2), (torch.ones(4, 3),)

def tensor():
    return nn.Linear(3, 2), torch.ones(4, 3)

def alone():
    return nn.Linear(3, 2)

def no_model():
    return "model", {}

def no_inputs():
    return nn.Linear(3, 2), 7

def wants(size):
    return nn.Linear(size, 2), torch.ones(4, size)

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module of good and bad functions; nothing that is imported stays."""
    (tmp_path / "nets.py").write_text(GOOD)
    (tmp_path / "broken.py").write_text("import not_there_at_all\n")
    (tmp_path / "raising.py").write_text("raise RuntimeError('no luck')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("nets", "broken", "raising"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("place", ["nets", "nets.py"])
def test_function_of_a_module_or_file_in_the_current_directory(here, place):
    model, args, kwargs = load(f"{place}:kwargs")
    assert args == ()
    assert model(**kwargs).shape == (4, 2)


@pytest.mark.parametrize("name", ["args", "tensor"])
def test_inputs_may_be_a_tuple_or_one_tensor(here, name):
    model, args, kwargs = load(f"nets:{name}")
    assert kwargs == {}
    assert model(*args).shape == (4, 2)


def test_file_elsewhere_finds_the_modules_beside_it(here, tmp_path_factory, monkeypatch):
    (here / "uses.py").write_text("from nets import args\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert isinstance(load(f"{here / 'uses.py'}:args")[0], torch.nn.Linear)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nets", "'nets' is not the name of a model; write module:function, path/file.py:function, or hf:"),
        ("hf:", "'hf:' is not the name of a model"),
        (":args", "':args' is not the name of a model"),
        ("nowhere:args", "module 'nowhere' is neither in this directory nor installed"),
        ("nets.inner:args", "module 'nets.inner' is neither in this directory"),
        ("nowhere.py:args", "file nowhere.py does not exist"),
        ("broken:args", "importing broken failed with ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("raising.py:args", "importing raising.py failed with RuntimeError: no luck"),
        ("nets:kwarg", "nets has no function 'kwarg'; did you mean kwargs"),
        ("nets:xyzzy", "nets has no function 'xyzzy'; name"),
        ("nets:number", "nets:number is of type int; it must be a function that returns"),
        ("nets:wants", r"nets:wants raised TypeError: wants\(\) missing 1 required positional argument: 'size'"),
        ("nets:alone", r"nets:alone returned Linear; it must return a pair \(model, inputs\)"),
        ("nets:no_model", "nets:no_model returned str first; the first must be the model"),
        ("nets:no_inputs", "nets:no_inputs returned int second; the second must be the inputs"),
    ],
)
def test_bad_function_is_told_with_what_to_write(here, spec, message):
    with pytest.raises(InputError, match=message):
        load(spec)


# Transformers

SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 12},
    "bert": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8},
    "t5": {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 8, "d_kv": 8, "vocab_size": 50},
    "vit": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "image_size": 32},
    "whisper": {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_model": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_source_positions": 20,
    },
}


def saved(directory: Path, kind: str, **more: object) -> Path:
    """A directory with the config of a small model."""
    (directory / "config.json").write_text(json.dumps({"model_type": kind, **SMALL[kind], **more}))
    return directory


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
        ("whisper", "WhisperForConditionalGeneration"),
    ],
)
def test_config_gives_a_model_with_its_head_and_a_loss(tmp_path, kind, name):
    model, args, kwargs = load(f"hf:{saved(tmp_path, kind)}", batch=3)
    assert type(model).__name__ == name
    assert args == ()
    assert {len(value) for value in kwargs.values()} == {3}
    assert model(**kwargs).loss.isfinite()


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_labels_fit_the_head_that_the_config_names(tmp_path, head):
    model, _, kwargs = load(f"hf:{saved(tmp_path, 'bert', architectures=['Bert' + head])}")
    assert type(model).__name__ == f"Bert{head}"
    assert model(**kwargs).loss.isfinite()


def test_config_file_is_as_good_as_its_directory(tmp_path):
    model, _, _ = load(f"hf:{saved(tmp_path, 'gpt2') / 'config.json'}")
    assert type(model).__name__ == "GPT2LMHeadModel"


def test_sample_is_no_longer_than_the_model_takes(tmp_path):
    _, _, kwargs = load(f"hf:{saved(tmp_path, 'gpt2')}", batch=1, length=128)
    assert kwargs["input_ids"].shape == (1, 12)
    assert int(kwargs["input_ids"].max()) < 50


def test_bare_type_gives_its_default_config_without_memory():
    model, _, _ = load("hf:llama", meta=True)
    assert model.config.num_hidden_layers == 32
    assert all(parameter.is_meta for parameter in model.parameters())


def test_model_larger_than_the_machine_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}.__getitem__)
    with pytest.raises(
        InputError, match=r"hf:llama has 25 GiB of parameters, but this machine has 4 GiB .* --costs count"
    ):
        load("hf:llama")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt3", "hf:gpt3 is not a model type of transformers, .* did you mean hf:"),
        ("no/such-model", "hf:no/such-model is not a model type of transformers, a path, or a model in the local"),
        ("llava", "hf:llava takes text and images; write a function"),
    ],
)
def test_unknown_type_is_told(name, message):
    with pytest.raises(InputError, match=message):
        load(f"hf:{name}", meta=True)


def test_directory_without_a_config_is_told(tmp_path):
    with pytest.raises(InputError, match="is not a config that transformers can read"):
        load(f"hf:{tmp_path}")


def test_missing_transformers_is_told_with_the_command_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "pipecompile.cli.huggingface", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"hf: needs transformers .* pip install 'pipecompile\[hf\]'"):
        load("hf:gpt2")
