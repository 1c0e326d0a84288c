"""measure: does a method help? Tasks, interleaved comparison, run store, report and evidence.

from tokenry.measure.compare import compare
from tokenry.measure.experiment import Design, Run, experiment
from tokenry.measure.task import Arm, Metric, Outcome, Sample
"""
