"""Text at the border: chat templates, tokenizers, incremental detokenizing, stop strings. No torch in here."""

from __future__ import annotations

from common.text.chat_template import ChatTemplate
from common.text.detokenizer import Detokenizer
from common.text.messages import normalize_messages
from common.text.stop import StopAutomaton, StopMatcher
from common.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopAutomaton", "StopMatcher", "Tokenizer", "normalize_messages"]
