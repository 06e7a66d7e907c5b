"""A pickle read as what it says, never as what it does: nothing is imported, nothing is called.

A pickle is a program. This machine runs only the instructions that build plain data; where the program names a class or
function it gets the name, and where it calls one, a record of the call. Knows nothing of tensors. Why not
``torch.load``: docs/decisions/0013-pickles.md.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO

_ORDERED_DICT = "collections.OrderedDict"


class PickleError(ValueError):
    """The pickle is malformed, or wants something that is not plain data. Its text says what."""


@dataclass(frozen=True, eq=False)
class Global:
    """A class or function by name: ``torch.FloatStorage``."""

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """What a call of the function ``name`` would have returned."""

    name: str
    arguments: tuple[Any, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class StorageReference:
    """Something outside the pickle, by the identifier that the pickle has for it."""

    identifier: Any = field(repr=False)


def read_pickle(file: BinaryIO, may_name: Callable[[str], bool]) -> Any:
    """The one object that the pickle at ``file``'s position builds; the position is then behind it.

    Dicts have keys that are text or integers. Raises PickleError, naming it, for a class or function that ``may_name``
    does not grant, before anything else is made of it.
    """
    machine = _Machine(may_name)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.pop()
            machine.run(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise PickleError(f"the pickle is malformed ({type(error).__name__}: {error})") from error
    raise PickleError("the pickle does not end")


_MARK = object()
_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """A stack and a memo. Instructions are methods in lower case, or entries of the tables above."""

    def __init__(self, may_name: Callable[[str], bool]) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._may_name = may_name

    def run(self, instruction: str, argument: Any) -> None:
        if instruction in _VALUES:
            self._stack.append(argument)
        elif instruction in _CONSTANTS:
            self._stack.append(_CONSTANTS[instruction]())
        elif instruction in _TUPLES:
            self._stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[instruction])])))
        elif instruction in _STEPS:
            _STEPS[instruction](self, argument)
        elif instruction not in _IGNORED:
            raise PickleError(f"the pickle has an instruction that plain data does not need ({instruction})")

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise PickleError("the pickle is malformed (a mark where a value is needed)")
        return value

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise PickleError(f"the pickle is malformed (it fills what is no {kind.__name__})")
        return self._stack[-1]

    def _items(self) -> list[Any]:
        """Everything above the last mark, which goes too."""
        position = len(self._stack) - 1
        while self._stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise PickleError("the pickle is malformed (no mark)")
        items = self._stack[position + 1 :]
        del self._stack[position:]
        return items

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def put(self, number: Any) -> None:
        self._memo[len(self._memo) if number is None else int(number)] = self._stack[-1]

    def get(self, number: Any) -> None:
        self._stack.append(self._memo[int(number)])

    def tuple_(self, _: Any) -> None:
        self._stack.append(tuple(self._items()))

    def list_(self, _: Any) -> None:
        self._stack.append(self._items())

    def dict_(self, _: Any) -> None:
        self._stack.append(_dict(self._items()))

    def append(self, _: Any) -> None:
        value = self.pop()
        self._top(list).append(value)

    def appends(self, _: Any) -> None:
        items = self._items()
        self._top(list).extend(items)

    def setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._top(dict).update(_dict([key, value]))

    def setitems(self, _: Any) -> None:
        items = self._items()
        self._top(dict).update(_dict(items))

    def global_(self, argument: Any) -> None:
        self._name(str(argument).replace(" ", "."))

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("the pickle is malformed (a name that is no text)")
        self._name(f"{module}.{name}")

    def _name(self, name: str) -> None:
        if name != _ORDERED_DICT and not self._may_name(name):
            advice = "use another copy of the checkpoint, or one that holds a state_dict() of plain tensors"
            raise PickleError(
                f"the pickle wants {name}, which weights do not need and which could run any code; {advice}"
            )
        self._stack.append(Global(name))

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise PickleError("the pickle is malformed (it calls what is no function)")
        if function.name == _ORDERED_DICT:
            pairs = arguments[0] if arguments else []
            self._stack.append(_dict([part for pair in _pairs(pairs) for part in pair]))
        else:
            self._stack.append(Call(function.name, arguments))

    def build(self, _: Any) -> None:
        self.pop()  # attributes of the object: data beside the tensors
        if not isinstance(self._stack[-1], dict | Call):
            raise PickleError("the pickle is malformed (attributes of what has none)")

    def refer(self, _: Any) -> None:
        self._stack.append(StorageReference(self.pop()))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": _Machine.tuple_,
    "LIST": _Machine.list_,
    "DICT": _Machine.dict_,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.refer,
}


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise PickleError("the pickle is malformed (a dict of what are no pairs)")
    return [(key, item) for key, item in value]


def _dict(items: Collection[Any]) -> dict[Any, Any]:
    """Keys and values in turn. A key of other types could take for ever to hash: tuples of tuples of tuples."""
    parts = list(items)
    if len(parts) % 2 or not all(type(key) in (str, int) for key in parts[::2]):
        raise PickleError("the pickle is malformed (a dict whose keys are neither text nor numbers)")
    return dict(zip(parts[::2], parts[1::2], strict=True))
