"""export=nothing: the numbers of a run, and no model."""

from mi_experiments.export.format import ExportFormat

NOTHING = ExportFormat()
