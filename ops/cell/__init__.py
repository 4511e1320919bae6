"""Recurrences that are not linear in the state: the cells of sLSTM and M2RNN."""

from .api import CELL_PARADIGMS, M2RNN_FAMILY, Backend, SLSTMOutput, m2rnn, slstm

__all__ = ["CELL_PARADIGMS", "M2RNN_FAMILY", "Backend", "SLSTMOutput", "m2rnn", "slstm"]
