"""What can go wrong in a calibration, as one sentence."""

from __future__ import annotations

from featherweight.errors import FeatherError


class CalibrationError(FeatherError):
    """Calibration cannot be done with this model, text or setting."""
