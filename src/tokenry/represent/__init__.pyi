from .text.prompt_embedder import PROMPTS as PROMPTS
from .text.prompt_embedder import PromptEmbedder as PromptEmbedder
from .text.prompt_embedder import clean_up as clean_up
from .text.sentence_transformer import TokenPrependingTransformer as TokenPrependingTransformer
from .token_prepending import Prepending as Prepending
from .token_prepending import TokenPrepending as TokenPrepending
