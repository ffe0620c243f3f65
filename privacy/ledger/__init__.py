"""The ledger of a site: append-only, hash-chained, signed; what privacy has been spent on."""

from fedward.privacy.ledger.book import Ledger
from fedward.privacy.ledger.records import Allotment, Entry, Population, Reservation
from fedward.privacy.ledger.verification import verify_export
from fedward.privacy.ledger.views import Point

__all__ = [
    "Allotment",
    "Entry",
    "Ledger",
    "Point",
    "Population",
    "Reservation",
    "verify_export",
]
