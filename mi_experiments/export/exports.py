"""The exports, each in a file of its own."""

from mi_experiments.config.config import Export
from mi_experiments.export.dense import DENSE
from mi_experiments.export.format import ExportFormat
from mi_experiments.export.nothing import NOTHING
from mi_experiments.export.packed import PACKED

EXPORTS: dict[Export, ExportFormat] = {
    Export.nothing: NOTHING,
    Export.dense: DENSE,
    Export.packed: PACKED,
}
"""What each value of `export` writes."""
