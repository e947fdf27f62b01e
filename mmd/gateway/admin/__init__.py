"""The administration API under /api/v1: what mmdctl speaks, on /run/mmd/admin.sock.

Every route is a `route.Route`, which makes both the handler's place in the application and its entry in the OpenAPI document.
"""

from mmd.gateway.admin.api import AdminApi

__all__ = ["AdminApi"]
