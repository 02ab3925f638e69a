"""For ``zconsole run``: puts the `Site` into a new instance."""

from blobsite import Site
import transaction


app = globals()["app"]  # zconsole's
app._setObject("site", Site("site"))
transaction.commit()
