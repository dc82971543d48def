"""TensorBoard's messages and event files, from its own protocol buffers.

``torch.utils.tensorboard`` would do, but it imports TensorFlow wherever that is installed, and writes
from a thread in which a full disk goes unnoticed.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.compat.proto.versions_pb2 import VersionDef
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from torch import Tensor

from fedtorch import disk
from fedtorch.tracking.tags import Chart

BINS = 30
"""Bars of a histogram."""


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


TABLE = tuple(map(_entry, range(256)))
"""What a byte does to CRC-32C (Castagnoli's polynomial, lowest bit first)."""


def scalars(values: Mapping[str, float], purposes: Mapping[str, str]) -> Any:
    """Curves' points, all of one step; what a curve is for is told with its first point."""
    made = Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()])
    for value in made.value:
        if words := purposes.get(value.tag):
            value.metadata.summary_description = words
            value.metadata.plugin_data.plugin_name = "scalars"
    return made


def text(tag: str, words: str) -> Any:
    """A panel of Markdown."""
    return _string(tag, "text", words.encode(), [1])


def pages(layout: Mapping[str, Mapping[str, Chart]]) -> Any:
    """The Custom Scalars pages."""
    made = layout_pb2.Layout()
    for page, charts in layout.items():
        category = made.category.add(title=page)
        for title, (kind, tags) in charts.items():
            chart = category.chart.add(title=title)
            if kind == "Margin":
                value, lower, upper = tags
                chart.margin.series.add(value=value, lower=lower, upper=upper)
            else:
                chart.multiline.tag.extend(tags)
    return _string("custom_scalars__config__", "custom_scalars", made.SerializeToString(), [])


def _string(tag: str, plugin: str, value: bytes, shape: Sequence[int]) -> Any:
    dims = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in shape])
    tensor = TensorProto(dtype=DT_STRING, string_val=[value], tensor_shape=dims)
    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=about)])


def image(tag: str, png: bytes) -> Any:
    """A picture."""
    width, height = struct.unpack(">II", png[16:24])  # the header of every PNG file
    shown = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=shown)])


def histogram(tag: str, values: Tensor) -> Any:
    """Distribution of the finite numbers among these."""
    numbers = values.detach().double().cpu().flatten().numpy()
    numbers = numbers[np.isfinite(numbers)] if len(numbers) else np.zeros(1)
    numbers = numbers if len(numbers) else np.zeros(1)
    counts, edges = np.histogram(numbers, BINS)
    # TensorBoard reads upper edges alone: an empty first bar gives the lowest one its lower edge
    shown = HistogramProto(
        min=float(numbers.min()),
        max=float(numbers.max()),
        num=len(numbers),
        sum=float(numbers.sum()),
        sum_squares=float(numbers @ numbers),
        bucket_limit=edges.tolist(),
        bucket=[0.0, *counts.tolist()],
    )
    return Summary(value=[Summary.Value(tag=tag, histo=shown)])


def graph(nodes: Sequence[tuple[str, str, Sequence[str], str]]) -> bytes:
    """A graph of (name, type, names of inputs, note)."""
    made = GraphDef(versions=VersionDef(producer=22))
    for name, kind, inputs, note in nodes:
        node = made.node.add(name=name, op=kind, input=inputs)
        if note:
            node.attr["note"].s = note.encode()
    return bytes(made.SerializeToString())


def experiment(columns: Mapping[str, float | str], metrics: Sequence[str]) -> Any:
    """Columns of the HParams table: options (an example of each gives its type) and final figures."""
    made = api_pb2.Experiment()
    for name, example in columns.items():
        kind = "STRING" if isinstance(example, str) else "FLOAT64"
        made.hparam_infos.add(name=name, type=getattr(api_pb2, f"DATA_TYPE_{kind}"))
    for tag in metrics:
        made.metric_infos.add(name=api_pb2.MetricName(tag=tag))
    return _hparams("experiment", experiment=made)


def session(values: Mapping[str, float | str]) -> Any:
    """The options of this run."""
    made = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, str):
            made.hparams[name].string_value = value
        else:
            made.hparams[name].number_value = value
    return _hparams("session_start_info", session_start_info=made)


def session_end(at: float) -> Any:
    """The run came to its end, at this time."""
    made = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=at)
    return _hparams("session_end_info", session_end_info=made)


def _hparams(name: str, **content: Any) -> Any:
    data = plugin_data_pb2.HParamsPluginData(version=0, **content)
    about = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    tag = f"_hparams_/{name}"
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=about))])


class EventFile:
    """Records of one event file, written as they come: an error is raised where it happens."""

    def __init__(self, folder: Path, suffix: str) -> None:
        """A new file beside those of earlier starts of the run."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}{suffix}"
        self.file = (folder / name).open("wb")
        self.clock = time.time
        self.event(file_version="brain.Event:2")
        self.file.flush()

    def event(self, **fields: Any) -> None:
        """Append one event, stamped with what the clock says."""
        self.file.write(framed(Event(wall_time=self.clock(), **fields).SerializeToString()))

    def write(self, proto: Any, step: int) -> None:
        """Append a summary."""
        self.event(step=step, summary=proto)

    def close(self) -> None:
        """No more events."""
        self.file.close()


def framed(data: bytes) -> bytes:
    """A record as TFRecord files hold it: length, its checksum, data, its checksum."""
    head = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (head, data)]
    return head + sums[0] + data + sums[1]


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, turned and moved as TFRecord files want it.

    TensorBoard has the same, behind modules that take twice as long to read as all its messages.
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(path: Path) -> Iterator[tuple[bytes, Any]]:
    """Packed and parsed events of a file, up to where a kill may have cut it."""
    raw, at = disk.regular(path).read_bytes(), 0
    while at + 16 <= len(raw):
        end = at + 16 + struct.unpack_from("<Q", raw, at)[0]
        record = raw[at:end]
        if end > len(raw) or framed(data := record[12:-4]) != record:
            return
        yield record, Event.FromString(data)
        at = end
