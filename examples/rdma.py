"""RDMA, as little of it as the examples need: a queue pair that reads and writes memory of another one."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple, Self

try:
    import pyverbs.enums as e  # type: ignore[import-not-found]
    from pyverbs.addr import GID, AHAttr, GlobalRoute  # type: ignore[import-not-found]
    from pyverbs.cq import CQ  # type: ignore[import-not-found]
    from pyverbs.device import Context  # type: ignore[import-not-found]
    from pyverbs.pd import PD  # type: ignore[import-not-found]
    from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr  # type: ignore[import-not-found]
    from pyverbs.wr import SGE, SendWR  # type: ignore[import-not-found]
except ImportError as error:
    if {"-h", "--help"} & {*sys.argv}:
        print(sys.modules["__main__"].__doc__)
        sys.exit()
    print(f"{error}; on Debian: apt-get install python3-pyverbs", file=sys.stderr)
    sys.exit(2)


class Name(NamedTuple):
    """What the other side has to know to connect."""

    queue_pair: int
    gid: str


class Endpoint:
    """A reliable connection. Transfers wait until they are done, and raise OSError when they fail."""

    def __init__(self, device: str = "rxe0", gid_index: int = 1) -> None:
        self._context = Context(name=device)
        self.domain = PD(self._context)
        self._gid_index = gid_index
        self._completions = CQ(self._context, 16)
        capacity = QPCap(max_send_wr=4, max_recv_wr=4, max_send_sge=1, max_recv_sge=1)
        both = {"scq": self._completions, "rcq": self._completions}
        self._queue_pair = QP(self.domain, QPInitAttr(qp_type=e.IBV_QPT_RC, cap=capacity, **both))
        self.name = Name(self._queue_pair.qp_num, str(self._context.query_gid(1, gid_index).gid))

    def connect(self, other: Name) -> Self:
        attributes = QPAttr(port_num=1)
        attributes.qp_access_flags = e.IBV_ACCESS_REMOTE_READ | e.IBV_ACCESS_REMOTE_WRITE
        attributes.dest_qp_num = other.queue_pair
        attributes.path_mtu = e.IBV_MTU_1024
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
        attributes.min_rnr_timer, attributes.timeout = 12, 18
        attributes.retry_cnt = attributes.rnr_retry = 7
        route = GlobalRoute(dgid=GID(other.gid), sgid_index=self._gid_index)
        attributes.ah_attr = AHAttr(port_num=1, is_global=1, gr=route)
        self._queue_pair.to_rts(attributes)
        return self

    def read(self, local: int, region: Any, length: int, remote: int, rkey: int) -> None:
        """From the other side's memory at `remote` to ours at `local`, which is in `region`."""
        self._transfer(e.IBV_WR_RDMA_READ, local, region, length, remote, rkey)

    def write(self, local: int, region: Any, length: int, remote: int, rkey: int) -> None:
        self._transfer(e.IBV_WR_RDMA_WRITE, local, region, length, remote, rkey)

    def _transfer(self, opcode: int, local: int, region: Any, length: int, remote: int, rkey: int) -> None:
        pieces = [SGE(local, length, region.lkey)]
        request = SendWR(sg=pieces, num_sge=1, opcode=opcode, send_flags=e.IBV_SEND_SIGNALED)
        request.set_wr_rdma(rkey, remote)
        self._queue_pair.post_send(request)
        while True:
            count, completions = self._completions.poll(1)
            if count:
                break
            os.sched_yield()
        if completions[0].status != e.IBV_WC_SUCCESS:
            raise OSError(f"the RDMA transfer failed with status {completions[0].status}")

    def close(self) -> None:
        for each in (self._queue_pair, self._completions, self.domain, self._context):
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
