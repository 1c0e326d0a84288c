from .reducers import Entropy as Entropy
from .reducers import LowEntropyRows as LowEntropyRows
from .reducers import Reducer as Reducer
from .reducers import SentenceMean as SentenceMean
from .reducers import TopKeys as TopKeys
from .trace import Captured as Captured
from .trace import Trace as Trace
from .trace import capture as capture
