"""pickle_writer: what it writes is read back as it was, by instructions that PyTorch takes."""

import collections
import pickletools

import pytest

from rndpo_jax.nnunet import pickle_program, pickle_writer
from rndpo_jax.nnunet.pickle_program import Call, Global, Persistent

# Of those that PyTorch reads with weights_only=True (torch/_weights_only_unpickler.py).
TAKEN = {
  "PROTO", "STOP", "GLOBAL", "REDUCE", "MARK", "TUPLE", "EMPTY_LIST", "EMPTY_DICT", "APPENDS",
  "SETITEMS", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "LONG1", "BINFLOAT", "BINUNICODE",
  "BINPERSID",
}  # fmt: skip
ORDERED = "collections.OrderedDict"


@pytest.mark.parametrize(
  "value",
  [
    None, True, False, 0, -1, 2**31 - 1, -(2**31), 2**31, 2**40, -(2**63), 0.1, float("inf"),
    "", "größe", [], [[], [1]], {}, {"a": {"b": (1, "c")}, 2: None}, (), ((),),
    Global("torch.FloatStorage"), Persistent(("storage", Global("torch.FloatStorage"), "0")),
    Call(Global(ORDERED), ()),
  ],
)  # fmt: skip
def test_a_value_is_read_back(value):
  data = pickle_writer.dump(value)
  found = pickle_program.run(data, {"torch.FloatStorage", ORDERED}, lambda call: call)
  assert found == value and type(found) is type(value)
  assert {opcode.name for opcode, _, _ in pickletools.genops(data)} <= TAKEN


def test_an_ordered_dict_keeps_its_order():
  data = pickle_writer.dump(pickle_writer.Ordered(b=1, a=2))
  found = pickle_program.run(data, {ORDERED}, lambda call: {})
  assert list(found.items()) == [("b", 1), ("a", 2)]
  names = [argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"]
  assert names == ["collections OrderedDict"]


@pytest.mark.parametrize("value", [b"x", {1}, object(), [collections.deque()]])
def test_another_type_raises(value):
  with pytest.raises(TypeError, match="expected plain data"):
    pickle_writer.dump(value)
