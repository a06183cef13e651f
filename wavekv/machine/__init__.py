"""What this machine is and how fast: its environment, measured rates, and the file that keeps
them."""

from wavekv.machine.rates import Rates
from wavekv.machine.record import MachineRecord, measured_machine

__all__ = ["MachineRecord", "Rates", "measured_machine"]
