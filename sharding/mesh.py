"""A mesh of devices: where arrays live on it, and how a function runs on all of its devices at once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.config import AXES
from sharding.place import Place
from sharding.rules import Axes, Rules

MEDIA = ("image_", "audio_")
"""How the names of arrays begin that belong to rows as a whole: [B, M, ...]."""


@dataclass(frozen=True)
class DeviceMesh:
    """Devices with named axes, of which `place` is the view from inside."""

    mesh: Mesh | AbstractMesh
    place: Place
    platform: str
    """Of the devices: cpu, gpu or tpu."""
    rules: Rules = field(default_factory=Rules)

    @classmethod
    def of(
        cls, devices: Sequence[Any], sizes: Mapping[str, int], *, in_order: bool = False, **options: Any
    ) -> "DeviceMesh":
        """A mesh with these sizes of `AXES`, whose product is the number of devices; options are those of `Place`.

        `in_order`: as the devices are given, the last axis first, rather than as they are wired. Some of the chips of a TPU
        slice, with others between them, can be laid out in no other way.
        """
        shape = tuple(sizes.get(name, 1) for name in AXES)
        assert math.prod(shape) == len(devices)
        types = (AxisType.Auto,) * len(AXES)
        if in_order:
            mesh = Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)
        else:  # Accelerators are put so that neighbours in the mesh are neighbours on the wires.
            mesh = jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        return cls(mesh, Place.on(dict(zip(AXES, shape, strict=True)), **options), devices[0].platform)

    @classmethod
    def planned(cls, sizes: Mapping[str, int], **options: Any) -> "DeviceMesh":
        """A mesh of devices that are not there, TPUs: shapes and shardings on it are those of such a mesh, and nothing runs."""
        shape = tuple(sizes.get(name, 1) for name in AXES)
        mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        return cls(mesh, Place.on(dict(zip(AXES, shape, strict=True)), **options), "tpu")

    @classmethod
    def alone(cls, device: Any | None = None) -> "DeviceMesh":
        """One device, by default the first."""
        return cls.of([device or jax.devices()[0]], {})

    def outside(self) -> "DeviceMesh":
        """One device, for a model on weights of this mesh whose code does not run inside `jax.shard_map`; see `Place`."""
        return replace(DeviceMesh.alone(), place=Place(outside=self.mesh))

    @property
    def devices(self) -> list[Any]:
        assert isinstance(self.mesh, Mesh), "a mesh that is planned has no devices"
        return list(self.mesh.devices.flat)

    @property
    def count(self) -> int:
        """Devices, whether they are there or planned."""
        return self.mesh.size

    @property
    def local(self) -> list[Any]:
        """Those of this process."""
        return [device for device in self.devices if device.process_index == jax.process_index()]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    @property
    def everywhere(self) -> NamedSharding:
        """For an array that is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, names: Iterable[str]) -> dict[str, NamedSharding]:
        """For the arrays of a batch: all are split by rows, and sequences [B,S] also along S."""
        rows, context = self.place.row_axes, "context" if self.place.size("context") > 1 else None
        specs = {name: (rows,) if name.startswith(MEDIA) else (rows, context) for name in names}
        return {name: NamedSharding(self.mesh, PartitionSpec(*spec)) for name, spec in specs.items()}

    @property
    def each(self) -> NamedSharding:
        """For an array with one number for each device."""
        return NamedSharding(self.mesh, PartitionSpec(AXES))

    def split(self, axes: Sequence[Axes]) -> NamedSharding:
        """For an array whose dims are split over these axes each."""
        return NamedSharding(self.mesh, PartitionSpec(*(names or None for names in axes)))

    def on_all(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`function` on every device, of its parts of the arguments; `inputs` and `outputs` are shardings.

        On one device that is the function itself.
        """
        if not self.place.axes:
            return function
        specs = [jax.tree.map(lambda sharding: sharding.spec, tree) for tree in (inputs, outputs)]
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)

    def share(self, rows: int, parts: int) -> np.ndarray:
        """The rows of a batch that this process has on its devices, in the order in which `put` takes them."""
        order = self.row_order(rows, parts)
        return np.concatenate([order[start:stop] for start, stop in self._local_rows(rows)])

    def put(self, share: Mapping[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
        """A batch of so many rows on the devices, from this process's share of it."""
        places = self._places(rows)

        def placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                return array[(places[index[0].indices(rows)[:2]], *index[1:])]

            return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

        return {name: placed(share[name], sharding) for name, sharding in self.batch(share).items()}

    def fetch(self, array: jax.Array) -> np.ndarray:
        """This process's rows of an array that is split as those of a batch are, in the order in which `put` takes them.

        Waits for the array. All of a row has to be on devices of this process.
        """
        rows = len(array)
        places = self._places(rows)
        share = np.empty((sum(stop - start for start, stop in places), *array.shape[1:]), array.dtype)
        for index, part in {str(part.index): (part.index, part) for part in array.addressable_shards}.values():
            share[(places[index[0].indices(rows)[:2]], *index[1:])] = part.data
        return share

    def _places(self, rows: int) -> dict[tuple[int, int], slice]:
        """(start, stop) of the rows on this process's devices -> where they are in its share."""
        places, place = {}, 0
        for start, stop in self._local_rows(rows):
            places[start, stop] = slice(place, place + stop - start)
            place += stop - start
        return places

    def _local_rows(self, rows: int) -> list[tuple[int, int]]:
        """(start, stop) of the rows on this process's devices, each once, in order."""
        by_row = NamedSharding(self.mesh, PartitionSpec(self.place.row_axes))
        indices = by_row.addressable_devices_indices_map((rows,)).values()
        return sorted({index[0].indices(rows)[:2] for index in indices if index})

    def row_order(self, rows: int, parts: int) -> np.ndarray:
        """The order of a batch's rows on the devices, [rows]: so that each device has its share of each of `parts`.

        A batch is cut into micro-batches first, rows i x rows / parts and on being micro-batch i on any mesh; each of
        those is then split over the devices.
        """
        return np.arange(rows).reshape(parts, self.place.row_parts, -1).transpose(1, 0, 2).reshape(-1)
