"""What this machine is and how fast: its environment, measured rates, and the file that keeps
them."""

from wavekv.machine.record import MachineRecord, measured_machine
from wavekv.machine.rates import Rates

__all__ = ["MachineRecord", "Rates", "measured_machine"]
