"""A format of one's own: the towers as programs of torch.export, which torch runs.

Its package has an entry point, after which `clip-rd-edge export MODEL --format pt2 -o bundle` writes such bundles, and
every other command runs them:

    [project.entry-points."clip_rd_edge.formats"]
    pt2 = "own_format:PT2"
"""

import io

import torch

from clip_rd_edge.bundle.formats import FormatInfo
from clip_rd_edge.exporting.formats import Format
from clip_rd_edge.exporting.towers import TOWERS, Toolchain, on_cpu, write_towers
from clip_rd_edge.runtime.backends.one_input import OneInputModel
from clip_rd_edge.runtime.encoder import BundleEncoder

PT2 = FormatInfo(
    title="torch.export", precisions=("fp32",), runtime="pt2", converter="own_format:Pt2", encoder="own_format:Encoder"
)


class Pt2(Format):
    def convert(self, job):
        return write_towers(job, Toolchain("torch.export", "pt2", ".pt2", content_of, open_program))

    def reference(self, folder, manifest):
        return Encoder(folder, manifest)


def content_of(clip, name, tower, inputs):
    """Return the content of a tower's file, for one input (1, …)."""
    content = io.BytesIO()
    with on_cpu(TOWERS[name](clip.model)) as module:
        torch.export.save(torch.export.export(module, (torch.from_numpy(inputs[:1]),), strict=False), content)
    return content.getvalue()


class Program(OneInputModel):
    """Runs such a file row by row, as ONNX Runtime's sessions run theirs."""

    def __init__(self, path):
        super().__init__(["input"])
        self.module = torch.export.load(path).module()

    def run_row(self, row):
        return self.module(torch.from_numpy(row[None])).detach().numpy()


def open_program(path, *, threads=None):
    return Program(path)


class Encoder(BundleEncoder):
    runtime = "pt2"

    def open_tower(self, tower):
        return Program(str(self.folder / tower.file))
