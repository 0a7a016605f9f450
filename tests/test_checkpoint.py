"""Checkpoints: exact, kept by rule, read onto other meshes, and what happens to damaged ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import Tiny

from causal_jax.errors import InputError
from causal_jax.paths import named_leaves
from causal_jax.training.checkpoint import Store, Unreadable, check_space, checksum, storage_fault
from causal_jax.training.optimizer import Muon
from causal_jax.training.sharding import MeshSpec, make_mesh
from causal_jax.training.state import abstract_state, new_state

SPEC = Tiny(vocab=16, width=8)
TX = Muon().transformation()


def _abstract(**axes):
    return abstract_state(SPEC, TX, make_mesh(MeshSpec(**axes)), ema=True)[0]


@pytest.fixture(scope="module")
def state():
    return new_state(SPEC, TX, _abstract(data=1), 0)


def _at(state, step):
    """A state like `state`, of another step and with other values."""
    moved = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state["params"])
    return state | {"step": jnp.asarray(step, jnp.int32), "params": moved}


def _equal(a, b):
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


def _saved(folder, state, *steps, said=None, **settings):
    said = [] if said is None else said
    store = Store(folder, say=said.append, **settings)
    for step in steps:
        store.save(step, _at(state, step), {"validation": None, "data": {"next_index": step}})
    store.wait()
    return store


def test_what_is_saved_is_read_bit_for_bit(tmp_path, state):
    store = _saved(tmp_path, state, 3)
    found, meta = store.restore(_abstract(data=1))
    assert _equal(found, _at(state, 3))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert meta["data"] == {"next_index": 3}
    assert meta["step"] == 3
    assert Store(tmp_path / "nothing").restore(_abstract(data=1)) is None


def test_a_checkpoint_is_read_onto_another_mesh(tmp_path, state):
    store = _saved(tmp_path, state, 1)
    abstract = _abstract(data=1, fsdp=4, tensor=2)
    found, _ = store.restore(abstract)
    assert _equal(found, _at(state, 1))
    same = jax.tree.map(
        lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), found, abstract
    )
    assert all(jax.tree.leaves(same))
    # and from eight devices back to one
    store = Store(tmp_path / "eight")
    store.save(2, found, {"validation": None})
    store.wait()
    back, _ = store.restore(_abstract(data=1))
    assert _equal(back, found)


def test_parts_can_be_read_alone(tmp_path, state):
    store = _saved(tmp_path, state, 1)
    abstract = _abstract(data=1)
    got = store.load(1, {"params": abstract["params"]})
    assert got.keys() == {"params"}
    assert _equal(got["params"], _at(state, 1)["params"])


def test_the_state_may_be_donated_while_it_is_written(tmp_path, state):
    store = Store(tmp_path)
    big = {"params": {"w": jnp.arange(1 << 20, dtype=jnp.float32)}, "step": jnp.asarray(1)}
    store.save(1, big, {"validation": None})
    jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(big)
    store.wait()
    abstract = {
        "params": {"w": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), abstract
    )
    found, _ = store.restore(abstract)
    np.testing.assert_array_equal(found["params"]["w"], np.arange(1 << 20, dtype=np.float32))


def test_newest_and_best_are_kept(tmp_path, state):
    store = Store(tmp_path, keep=2, keep_best=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, float("nan"))):
        store.save(step, _at(state, step), {"validation": loss})
    store.wait()
    assert store.steps() == [2, 4, 5]
    assert (store.find("latest"), store.find("best"), store.find(4)) == (5, 2, 4)
    assert store.find("4") == 4
    store.save(5, _at(state, 99), {"validation": None})  # there already: left alone
    store.wait()
    assert _equal(store.restore(_abstract(data=1))[0], _at(state, 5))


def test_finding_what_is_not_there(tmp_path, state):
    with pytest.raises(InputError, match="holds no checkpoint"):
        Store(tmp_path).find()
    store = _saved(tmp_path, state, 1, 2)
    with pytest.raises(InputError, match="checkpoint 7: use latest, best or one of the steps 1, 2"):
        store.find(7)
    with pytest.raises(InputError, match="has a validation loss: use latest"):
        store.find("best")


def _largest(folder: Path) -> Path:
    return max((p for p in folder.glob("params/**/d/*")), key=lambda p: p.stat().st_size)


def _truncate(folder):
    path = _largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(folder):
    path = _largest(folder)
    path.write_bytes(bytes(path.stat().st_size))


def _flip(folder):
    # one bit of every data file: whatever file holds the numbers that are read, it is hit
    for path in folder.glob("params/**/d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


DAMAGE = {
    "data truncated": _truncate,
    "data zeroed": _zero,
    "bit flipped": _flip,
    "data missing": lambda folder: _largest(folder).unlink(),
    "part missing": lambda folder: shutil.rmtree(folder / "train"),
    "description missing": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "description torn": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text('{"custom_me'),
    "all but the folder": lambda folder: [shutil.rmtree(p) for p in folder.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize("case", DAMAGE, ids=[c.replace(" ", "-") for c in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, state, case):
    said = []
    store = _saved(tmp_path, state, 1, 2, said=said)
    DAMAGE[case](tmp_path / "2")
    found, meta = store.restore(_abstract(data=1))
    assert _equal(found, _at(state, 1))
    assert meta["data"] == {"next_index": 1}
    assert said[0].startswith("checkpoint 2 cannot be read: ")
    assert "going on from checkpoint 1 instead" in said
    assert store.steps() == [1]
    assert (tmp_path / "damaged-2").is_dir()
    # the step can be made again
    store.save(2, _at(state, 2), {"validation": None})
    store.wait()
    assert _equal(store.restore(_abstract(data=1))[0], _at(state, 2))


def test_nothing_readable_is_an_error_that_names_all(tmp_path, state):
    store = _saved(tmp_path, state, 1, 2)
    for step in (1, 2):
        _truncate(tmp_path / str(step))
    with pytest.raises(InputError, match=r"none of the checkpoints in .* \(step 2: .*; step 1: "):
        store.restore(_abstract(data=1))
    assert store.steps() == [1, 2]  # and nothing was touched


def test_another_model_is_not_read_into_this_one(tmp_path, state):
    store = _saved(tmp_path, state, 1)
    wider, _ = abstract_state(Tiny(vocab=16, width=16), TX, make_mesh(MeshSpec(data=1)), ema=True)
    with pytest.raises(Unreadable, match=r"embed/table is float32\(16, 8\) there|damaged|missing"):
        store.load(1, {"params": wider["params"]})


def test_leftovers_of_a_killed_process_are_ignored_then_cleaned(tmp_path, state):
    store = _saved(tmp_path, state, 1)
    for name in ("2.orbax-checkpoint-tmp", "0.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("half")
    assert store.steps() == [1]
    store.clean()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]


def test_the_checksum_sees_every_bit_and_no_sharding():
    values = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    mesh = make_mesh(MeshSpec(data=1, fsdp=8))
    spread = jax.device_put(values, NamedSharding(mesh, PartitionSpec("fsdp")))
    half = jnp.asarray(values, jnp.bfloat16)
    mask = jnp.asarray([True, False])
    one = int(checksum({"a": jnp.asarray(values), "b": half, "c": mask}))
    assert int(checksum({"c": mask, "b": half, "a": spread})) == one
    values.view(np.uint32)[3, 5] ^= 1
    assert int(checksum({"a": jnp.asarray(values), "b": half, "c": mask})) != one


# a full disk, for real: a limit on the size of a file, and a small file system to be mounted

WRITER = """
import resource, signal, sys
import jax, jax.numpy as jnp
from causal_jax.errors import InputError
from causal_jax.training.checkpoint import Store

folder, limit = sys.argv[1], int(sys.argv[2])
state = {"params": {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}, "step": jnp.asarray(1)}
small = {"params": {"w": jnp.zeros(4)}, "step": jnp.asarray(1)}
store = Store(folder)
store.save(1, small, {"validation": None})
store.wait()
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    store.save(2, state, {"validation": None})
    store.wait()
except InputError as e:
    print(e)
    print(store.steps())
    sys.exit(2)
"""


def _write_until_full(folder, limit):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WRITER, str(folder), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    message, steps = done.stdout.strip().splitlines()
    assert message.startswith(f"checkpoint 2 could not be written to {folder}: the disk is full")
    assert "checkpoint 1 is complete" in message
    assert "run the same command again" in message
    assert json.loads(steps) == [1]
    assert sorted(p.name for p in Path(folder).iterdir()) == ["1"]
    Store(folder).meta(1)


def test_a_full_disk_is_said_and_costs_only_the_checkpoint_in_the_making(tmp_path):
    _write_until_full(tmp_path, 1 << 20)


def test_a_full_file_system(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        (place / "run").mkdir()
        _write_until_full(place / "run", 0)
        with pytest.raises(InputError, match=r"MiB free, one checkpoint needs about 100.0 MiB"):
            check_space(place, 100 << 20)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_storage_faults_are_told_from_others():
    assert storage_fault(OSError(28, "No space left on device")) is not None
    assert storage_fault(PermissionError(13, "denied")) == "writing there is not allowed"
    assert storage_fault(ValueError("x [os_error_code='28']")) is not None
    outer = RuntimeError("outer")
    outer.__cause__ = OSError(122, "quota")
    assert storage_fault(outer) is not None
    assert storage_fault(ValueError("shape")) is None
    assert storage_fault(FileNotFoundError(2, "x")) is None
