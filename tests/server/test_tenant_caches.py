"""KV caches of several tenants under one quota: those of one neither count nor give way for another."""

from tests.server.conftest import Serve
from tests.server.drawing import png
from vflow_client import Client, Session


def shown(client: Client, seed: int) -> Session:
    session = client.session()
    session.add_image(png(112, 112, seed))
    return session


def test_each_tenant_has_the_quota_to_itself(serve: Serve) -> None:
    probe = serve()
    alone = shown(probe.client, 0).state().kv_bytes
    probe.stop()
    served = serve(tenant_kv=str(2 * alone))
    with served.connect(tenant="red") as red, served.connect(tenant="blue") as blue:
        reds = [shown(red, seed) for seed in range(2)]
        blues = [shown(blue, seed) for seed in range(2)]
        assert all(session.state().resident for session in (*reds, *blues)), "others' caches were counted"
        blues += [shown(blue, seed) for seed in range(2, 5)]
        assert [session.state().resident for session in blues] == [False, False, True, True, True]
        assert all(session.state().resident for session in reds), "others' caches gave way"
        for session in (*reds, *blues):
            session.delete()
