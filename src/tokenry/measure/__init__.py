"""measure: does a method help? Tasks, interleaved comparison, run store, report and evidence.

from tokenry.measure.compare import compare
from tokenry.measure.task import Experiment, Metric, Outcome, Sample, Subject
"""
