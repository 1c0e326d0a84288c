__version__: str

from . import catalog as catalog
from . import decode as decode
from . import hooks as hooks
from . import judge as judge
from . import measure as measure
from . import read as read
from . import represent as represent
from . import select as select
from . import serve as serve
from . import tokenize as tokenize
from . import trace as trace
from . import train as train
from . import zoo as zoo
from .core.errors import InputError as InputError
from .decode.api import generate as generate
from .models.load import load as load
from .trace.trace import Trace as Trace
from .trace.trace import capture as capture
