from .app import create_app as create_app
from .backend import Backend as Backend
from .backend import Busy as Busy
from .backend import Piece as Piece
from .backend import Ranked as Ranked
from .backend import Work as Work
from .service import Limits as Limits
