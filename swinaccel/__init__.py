"""swinaccel: Swin-style vision models, faster by one line and never wrong.

    model = swinaccel.accelerate(model)

See `accelerate`, and https://github.com/swinaccel/swinaccel for the rest.
"""

from . import functional, nn
from .api import accelerate, accelerated, disabled, plan, report, restore
from .config import AccelConfig, env_auto
from .errors import FallbackError
from .report import Report
from .verify import VerifyResult, verify

__version__ = "0.1.0"

__all__ = [
    "AccelConfig",
    "FallbackError",
    "Report",
    "VerifyResult",
    "accelerate",
    "accelerated",
    "disabled",
    "functional",
    "nn",
    "plan",
    "report",
    "restore",
    "verify",
]

if env_auto():
    from . import auto

    auto.start()
