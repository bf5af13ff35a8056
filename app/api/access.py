"""Who has called: for routes that want to know. The guard has checked the key before."""

from typing import Annotated

from fastapi import Depends, Request

from app.errors import Forbidden
from app.keys import Key


async def get_key(request: Request) -> Key | None:
    """The key of this request; None where the service has no keys."""
    key: Key | None = request.scope["state"].get("key")
    return key


KeyDep = Annotated[Key | None, Depends(get_key)]


async def require_admin(key: KeyDep) -> Key:
    """The admin key of this request. Raises Forbidden for any other, and where there are no keys at all."""
    if key is None:
        raise Forbidden("this path needs an admin key, and this service has no keys")
    if not key.admin:
        raise Forbidden("this path needs an admin key")
    return key


AdminDep = Annotated[Key, Depends(require_admin)]
