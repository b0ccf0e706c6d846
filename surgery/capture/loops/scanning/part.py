"""What goes through one kind of code in a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.capture.loops.scanning.scan import Scan


class Part:
    """Base of what goes through one kind of code.

    Args:
        scan: Has the parts for other kinds of code.
    """

    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self._driver = scan.driver
        self._names = scan.names
        self._contents = scan.contents
        self._notes = scan.notes
