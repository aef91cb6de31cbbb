"""Files that torch wrote: the same tensors with torch and without, and nothing that they ask for is run."""

import collections
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch

from ses_jax.convert import files
from ses_jax.convert.engine import ConversionError
from ses_jax.convert.pickles import open_pickle

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:Detected pickle protocol")]


def without_torch(file):
    """What `open_pickle` does where torch is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        return open_pickle(file)


@pytest.fixture(params=[open_pickle, without_torch], ids=["with torch", "without torch"])
def reader(request):
    return request.param


def tensors():
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return {
        "matrix": base,
        "transposed": base.T,
        "part": base[2:4, 1::3],
        "repeated": base[0].expand(3, 8),
        "scalar": torch.tensor(4.6),
        "empty": base[:0],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "ids": torch.arange(5)[None],
        "parameter": torch.nn.Parameter(base[1]),
    }


def test_a_pointer_in_the_place_of_a_file_is_named(tmp_path, reader):
    (tmp_path / "weights.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConversionError, match=r"weights\.pt is not the file itself but a pointer of Git LFS"):
        reader(tmp_path / "weights.pt")


@pytest.mark.parametrize("wrap", [dict, lambda t: {"epoch": 3, "name": "x", "state_dict": collections.OrderedDict(t)}])
def test_tensors_are_read_as_they_are(tmp_path, reader, wrap):
    file = tmp_path / "weights.pt"
    torch.save(wrap(tensors()), file)
    weights = reader(file)
    assert weights.headers.keys() == tensors().keys()
    for name, tensor in tensors().items():
        values = weights.read(name)
        assert weights.headers[name].shape == values.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(values.astype(np.float64), tensor.detach().double().numpy())
    kinds = {"half": "F16", "bfloat": "BF16", "ids": "I64", "matrix": "F32"}
    assert {name: weights.headers[name].dtype for name in kinds} == kinds


def test_the_state_of_a_module_is_read(tmp_path, reader):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "module.pth")
    weights = reader(tmp_path / "module.pth")
    np.testing.assert_array_equal(weights.read("0.weight"), module[0].weight.detach().numpy())


class Attack:
    """Makes a file when it is unpickled by a reader that runs what it is told."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({str(self.target)!r}, 'w').close()",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused(tmp_path, reader, protocol):
    file, trace = tmp_path / "weights.pt", tmp_path / "trace"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "more": Attack(trace)}, file, pickle_protocol=protocol)
    with pytest.raises(
        ConversionError, match=r"weights.pt .*(asks to run|holds more than tensors).*; convert the file to safetensors"
    ) as error:
        reader(file)
    # torch does not read this protocol's names.
    assert "exec" in str(error.value) or (reader is open_pickle and protocol == 4)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # what the readers above did not do
    assert trace.exists()


def test_a_whole_module_is_refused(tmp_path, reader):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=r"model.pt asks to run torch.nn.modules.linear.Linear"):
        reader(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": torch.zeros(2), "b": "text"}])
def test_what_is_not_a_dictionary_of_tensors_is_refused(tmp_path, reader, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match=r"x.pt holds (a list, not a dictionary of|more than) tensors"):
        reader(tmp_path / "x.pt")


@pytest.mark.parametrize("damage", ["truncate", "empty", "not a zip"])
def test_damaged_files_are_named(tmp_path, reader, damage):
    file = tmp_path / "x.pt"
    torch.save(tensors(), file)
    content = file.read_bytes()
    file.write_bytes({"truncate": content[: len(content) // 2], "empty": b"", "not a zip": b"x" * 100}[damage])
    with pytest.raises(ConversionError, match=r"x.pt is (truncated or )?corrupt"):
        reader(file)


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    """A hand-made file whose tensor would read other memory."""
    rebuild = (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
               b"X\x03\x00\x00\x00cpuK\x04tQK\x00(K\x64t(K\x01tI00\nNtR")  # fmt: skip
    pickled = b"\x80\x02}X\x01\x00\x00\x00a" + rebuild + b"s."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", np.zeros(4, np.float32).tobytes())
    with pytest.raises(ConversionError, match=r"a tensor outside its storage"):
        without_torch(tmp_path / "x.pt")


def test_allowed_names_cannot_be_changed(tmp_path):
    """BUILD sets attributes of what a name stands for; the next file must find it as it was."""
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"torch\nFloatStorage"):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02c" + name + b"\n}X\x04\x00\x00\x00evilK\x01sb.")
        with pytest.raises(ConversionError, match="corrupt"):
            without_torch(tmp_path / "x.pt")
    assert not hasattr(collections.OrderedDict, "evil")


def test_old_files_need_torch(tmp_path):
    file = tmp_path / "old.pth"
    torch.save({"a": torch.arange(3.0)}, file, _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_pickle(file).read("a"), [0, 1, 2])
    with pytest.raises(ConversionError, match=r"older than torch 1.6; .*\(or install torch\)"):
        without_torch(file)


def test_the_first_name_that_is_there_is_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected new.safetensors, .pt or .pth or old.*, found nothing"):
        files.open_named(tmp_path, ["new", "old"])
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pth")
    assert files.open_named(tmp_path, ["new", "old"]).headers.keys() == {"a"}
    files.write_weights(tmp_path, "new", [("b", np.zeros(2))])
    torch.save({"c": torch.zeros(1)}, tmp_path / "new.pt")
    assert files.open_named(tmp_path, ["new", "old"]).headers.keys() == {"b"}


def test_plain_pickles_are_refused_as_well(tmp_path, reader):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Attack(tmp_path / "trace")))
    with pytest.raises(ConversionError, match=r"x.pt"):
        reader(tmp_path / "x.pt")
    assert not (tmp_path / "trace").exists()


def archive(file, program, storages=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("weights/data.pkl", program)
        for name, data in (storages or {}).items():
            out.writestr(f"weights/data/{name}", data)
    return file


def test_a_place_in_memory_far_away_is_not_made(tmp_path):
    """The C unpickler would allocate all places before it: 8 GiB for this one."""
    file = archive(tmp_path / "bomb.pt", b"\x80\x02}r\xff\xff\xff\x3f.")
    with pytest.raises(
        ConversionError, match=r"bomb\.pt is truncated or corrupt: it remembers something at place 1073741823"
    ):
        without_torch(file)


def test_what_unpacks_to_more_than_the_file_is_not_unpacked(tmp_path):
    file = archive(tmp_path / "bomb.pt", b"\x80\x02}.", {"0": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConversionError, match=r"weights/data/0 would be larger than the file"):
        without_torch(file)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    repeated = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"huge": repeated}, tmp_path / "huge.pt")
    for read in (open_pickle, without_torch):
        with pytest.raises(ConversionError, match=r"huge\.pt (holds tensors without plain numbers: huge|is truncated)"):
            read(tmp_path / "huge.pt")


def odd(kind):
    """A tensor that is no array."""
    return torch.zeros(2, device="meta") if kind == "meta" else torch.eye(2).to_sparse()


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_that_are_no_arrays_are_named(tmp_path, reader, kind):
    torch.save({"fine": torch.ones(2), "other": odd(kind)}, tmp_path / "odd.pt")
    with pytest.raises(ConversionError, match=r"odd\.pt"):
        reader(tmp_path / "odd.pt")
