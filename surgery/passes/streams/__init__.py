"""States that flow past blocks: who calls those, with what, and the code that mixes them."""

from __future__ import annotations

from surgery.passes.streams.across import AcrossSegment, Chain, CutPlan, find_chains
from surgery.passes.streams.drivers import (
    check_released,
    drive,
    plan_across,
    plan_driver,
    planned_code,
    release,
)
from surgery.passes.streams.graph_driver import Captured
from surgery.passes.streams.holders import cover, holder_mixin, uncover
from surgery.passes.streams.ports import Stream
from surgery.passes.streams.runs import Run, Runs, find_runs
from surgery.passes.streams.segment import (
    CHILD,
    Fixed,
    Segment,
    Segments,
    all_segments,
    parameter_groups,
    segments_of,
    shortcuts,
)
from surgery.passes.streams.sites import BlockPlan, graft_blocks, plan_sites, ungraft_blocks
from surgery.passes.streams.stages import with_a_state

__all__ = [
    "CHILD",
    "AcrossSegment",
    "BlockPlan",
    "Captured",
    "Chain",
    "CutPlan",
    "Fixed",
    "Run",
    "Runs",
    "Segment",
    "Segments",
    "Stream",
    "all_segments",
    "check_released",
    "cover",
    "drive",
    "find_chains",
    "find_runs",
    "graft_blocks",
    "holder_mixin",
    "parameter_groups",
    "plan_across",
    "plan_driver",
    "plan_sites",
    "planned_code",
    "release",
    "segments_of",
    "shortcuts",
    "uncover",
    "ungraft_blocks",
    "with_a_state",
]
