"""What Dynamo may call but not read. Imported by `TorchBackend.enter` while a program is traced, and only then:
it needs torch._dynamo, which takes longer to import than torch.
"""

from __future__ import annotations

import torch._dynamo

from nibs_torch.tracing import answer

__all__ = ["loss"]

loss = torch._dynamo.nonstrict_trace(answer)
