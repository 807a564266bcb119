"""From named checkpoint tensors to the parameters of a model, one tensor at a time.

A family says once how its checkpoints are laid out (`weight_map`); whoever reads files only has to
call `ParamFiller.add(name, array)` for every tensor, in any order:

    filler = families.filler(config, dtype=jnp.bfloat16)      # nothing is allocated yet
    for name, array in tensors:                              # any order, any file
        filler.add(name, array)
    model = filler.finish()                                  # or CheckpointError, listing all
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Path = tuple[str | int, ...]

_LISTED = 12  # names of one kind that an error message shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """Where one checkpoint tensor goes.

    The tensor, transposed if `transpose`, is the part [offset : offset + n] of the parameter along
    `axis`; with `offset=None` it is the whole parameter.

    Attributes:
      path: of the parameter in the model's flat NNX state, such as ("layers", 0, "qkv", "kernel").
      shape: of the tensor in the checkpoint.
      transpose: swaps the two axes of a matrix (torch stores linear weights as [out, in]).
      axis: of the parameter along which parts are put together.
      offset: where this part begins along `axis`; None if the tensor is the whole parameter.
    """

    path: Path
    shape: tuple[int, ...]
    transpose: bool = False
    axis: int = 0
    offset: int | None = None

    def index(self) -> tuple[slice, ...]:
        """The part of the parameter that this tensor fills."""
        if self.offset is None:
            return ()
        size = self.shape[::-1][self.axis] if self.transpose else self.shape[self.axis]
        return (slice(None),) * self.axis + (slice(self.offset, self.offset + size),)


class CheckpointError(ValueError):
    """A checkpoint does not fit the model.

    Attributes:
      missing: names of tensors that the model needs and that never came.
      unexpected: names of tensors that the model has no place for.
      misfits: one sentence per tensor that came with a wrong shape or dtype, or twice.
    """

    def __init__(self, *, missing: list[str], unexpected: list[str], misfits: list[str]):
        self.missing, self.unexpected, self.misfits = missing, unexpected, misfits
        kinds = (("missing", missing), ("unexpected", unexpected), ("misfitting", misfits))
        lines = [
            f"{len(names)} {kind} tensor{'s' if len(names) > 1 else ''}:\n" + _listing(names)
            for kind, names in kinds
            if names
        ]
        super().__init__("the checkpoint does not fit the model.\n" + "\n".join(lines))


def _listing(names: list[str]) -> str:
    lines = [f"  {name}" for name in names[:_LISTED]]
    if len(names) > _LISTED:
        lines.append(f"  ... and {len(names) - _LISTED} more")
    return "\n".join(lines)


class ParamFiller:
    """Fills an abstract model with checkpoint tensors.

    A parameter is cast and moved to its device as soon as all its parts have come, and its host
    copy is dropped: beside the model itself the host holds one tensor, and those fused parameters
    of which some parts are still to come.

    Args:
      model: an NNX module from `nnx.eval_shape`, or a real one whose parameters are to be replaced.
      weight_map: checkpoint name -> `Weight`; together they must cover every parameter exactly.
      dtype: of all parameters; None keeps the dtypes of `model`.
      canonical_name: turns the spellings of a checkpoint into the names of `weight_map`.
      ignored: True for canonical names of tensors that may come but are not needed.
      device: where parameters go: a device, a sharding, or a function from (path, shape) to either.

    Raises:
      ValueError: if `weight_map` does not fit `model` (a fault of the family, not of a checkpoint).
    """

    def __init__(
        self,
        model: nnx.Module,
        weight_map: Mapping[str, Weight],
        dtype: Any = None,
        *,
        canonical_name: Callable[[str], str] = lambda name: name,
        ignored: Callable[[str], bool] = lambda name: False,
        device: Any = None,
    ):
        self._graphdef, state = nnx.split(model)
        self._variables = dict(nnx.to_flat_state(state))
        self._weight_map = weight_map
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._canonical_name, self._ignored, self._device = canonical_name, ignored, device
        self._waiting = dict(weight_map)  # tensors that have not come yet
        self._parts: dict[Path, int] = {}  # elements still to come, per parameter
        self._buffers: dict[Path, np.ndarray] = {}  # fused parameters that are under way
        self._arrays: dict[Path, jax.Array] = {}  # parameters that are done
        self._misfits: list[str] = []
        self._unexpected: list[str] = []
        for weight in weight_map.values():
            self._parts[weight.path] = self._parts.get(weight.path, 0) + math.prod(weight.shape)
        _check_cover(self._parts, {path: leaf.shape for path, leaf in self._variables.items()})

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes one tensor: `array` in the checkpoint's shape, any floating dtype.

        A tensor that does not fit is noted, and reported by `finish` together with all others.
        """
        name = self._canonical_name(name)
        if name not in self._weight_map:
            if not self._ignored(name):
                self._unexpected.append(name)
            return
        if name not in self._waiting:
            self._misfits.append(f"{name}: came twice")
            return
        weight = self._waiting.pop(name)
        dtype = self._dtype or np.dtype(self._variables[weight.path].dtype)
        if tuple(array.shape) != weight.shape:
            problem = f"expected shape {weight.shape}, got {tuple(array.shape)}"
        # Numpy does not count bfloat16 among its floating dtypes; jnp does.
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problem = f"expected floating-point values, got {array.dtype}"
        elif dtype == np.float16 and _overflows(array):
            problem = "has values beyond the range of float16; load as bfloat16 or float32"
        else:
            self._place(weight, array.T if weight.transpose else array, dtype)
            return
        self._misfits.append(f"{name}: {problem}")

    def _place(self, weight: Weight, array: np.ndarray, dtype: np.dtype) -> None:
        path, shape = weight.path, self._variables[weight.path].shape
        if weight.offset is None:
            # A copy even where the dtype is right: on CPU the device array may share the host's
            # memory, which must not be a file's mapping or an array that the caller goes on using.
            buffer = np.array(array, dtype=dtype, order="C")
        else:
            buffer = self._buffers.setdefault(path, np.empty(shape, dtype))
            buffer[weight.index()] = array.astype(dtype)
        self._parts[path] -= array.size
        if not self._parts[path]:
            self._buffers.pop(path, None)
            device = self._device(path, shape) if callable(self._device) else self._device
            self._arrays[path] = jax.device_put(buffer, device)

    def missing(self) -> list[str]:
        """Names of the tensors that have not come yet."""
        return list(self._waiting)

    @property
    def unexpected(self) -> list[str]:
        """Names of the tensors that came and have no place in the model."""
        return list(self._unexpected)

    def finish(self) -> nnx.Module:
        """The model with all its parameters.

        Raises:
          CheckpointError: if a tensor is missing, unexpected, or did not fit; lists all of them.
        """
        if self._waiting or self._unexpected or self._misfits:
            raise CheckpointError(
                missing=self.missing(), unexpected=self.unexpected, misfits=list(self._misfits)
            )
        filled = [
            (path, variable.replace(self._arrays[path]))
            for path, variable in self._variables.items()
        ]
        return nnx.merge(self._graphdef, nnx.from_flat_state(filled))


def _overflows(array: np.ndarray) -> bool:
    """Whether a finite value of `array` becomes infinite in float16."""
    if array.dtype == np.float16 or not array.size:
        return False
    finite = np.isfinite(array)
    return bool(np.any(np.abs(array, where=finite, out=np.zeros_like(array)) > 65504))


def _check_cover(sizes: Mapping[Path, int], shapes: Mapping[Path, tuple[int, ...]]) -> None:
    """Raises ValueError unless the tensors of a weight map cover the parameters exactly."""
    wrong = sorted(
        (".".join(map(str, path)), sizes.get(path, 0), shapes.get(path))
        for path in sizes.keys() | shapes.keys()
        if path not in shapes or sizes.get(path) != math.prod(shapes[path])
    )
    if wrong:
        raise ValueError(
            "the weight map must cover every parameter of the model; (parameter, elements in the "
            f"map, shape in the model) that differ: {wrong}"
        )
