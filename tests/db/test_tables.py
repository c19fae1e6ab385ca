"""What keeps a batch from being applied is found with the statements that the settings use."""

from itertools import product

import pytest

from db.apply.tables import Tables
from db.connection.engine import Database
from db.merge.policy import Policy
from tests.db.test_users import SHARED, deleted, saved
from tests.support.payloads import ANN, BEN
from tests.support.settings import MakeSettings

POLICIES = [
    Policy(anonymize=anonymize, follows_memberships=follows, organization_value=value, keeps_fields=keeps)
    for anonymize, follows, value, keeps in product(
        (False, True), (False, True), ("name", "id", "slug"), (False, True)
    )
] + [Policy(anonymize, owns_role=False, owns_organization=False) for anonymize in (False, True)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_write_of_a_policy_runs_on_no_rows(make_settings: MakeSettings, policy: Policy) -> None:
    database = Database(make_settings(redis_url=None))
    assert Tables(database, policy).locked([saved(ANN, 1, SHARED), deleted(BEN, 2)]) == frozenset()
    database.dispose()
