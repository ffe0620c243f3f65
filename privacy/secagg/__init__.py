"""Secure aggregation: state machines that take and return messages, with no I/O.

The coordinator learns the sum of the sites' vectors and nothing else of them::

      a site (SiteSession)                          the coordinator (CoordinatorSession)

    once a run, when the study is admitted
      SiteSession(terms, …)  ◄──────── terms ────────  Terms.propose(…)
      key()                  ────── signed key ──────► add_key()
      accept()               ◄──── all the keys ─────  key_list()
                             ── shares of rounds 1… ─► add_shares()
    a round
      begin()                ◄──── who takes part ───  open_round()
      … trains …
      mask(vector)           ───── masked vector, ───► add_update()        one running sum
                              signature, later shares
      confirm()              ◄── who survives, if ───  close_updates()     {} in the good case
                                not everybody does
                             ────── signature ───────► add_confirmation()
      unmask()               ◄── who survives, with ─  unmask_requests()
                              their signatures
                             ── one share of each ───► add_unmasking()
                                                       finish()  ──► RoundSum
    a site that was away
      shares()               ◄── rounds that lack ───  shares_request()    {} in the good case
                             ──────── shares ────────► add_shares()

A masked vector is the site's vector, plus a stream that only it can make, plus a stream shared
with each other site, which that site subtracts. Who survives is signed, so that a coordinator that
tells sites different things gets nothing. `docs/secure-aggregation.md` has the threat model.
`rounds.run_round` runs all of it in one process.
"""

from fedward.privacy.secagg.coordinator import CoordinatorSession, RoundSum
from fedward.privacy.secagg.graph import Degree, choose_degree
from fedward.privacy.secagg.site import SiteSession
from fedward.privacy.secagg.terms import Adversary, Terms, least_threshold

__all__ = [
    "Adversary",
    "CoordinatorSession",
    "Degree",
    "RoundSum",
    "SiteSession",
    "Terms",
    "choose_degree",
    "least_threshold",
]
