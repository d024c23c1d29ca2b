"""Tests on a cluster in use leave neither topics nor groups there."""

from confluent_kafka.admin import AdminClient
from conftest import create_topic, delete_topics_and_groups


def test_only_what_the_tests_made_is_deleted(scripts, cluster, topic, group, filled):
    mark = f"{topic}-marked"
    create_topic(cluster, f"{mark}-more")
    assert scripts.consumer("-t", topic, "-G", f"{mark}-group", "--exit").wait() == 0
    assert scripts.consumer("-t", topic, "-G", group, "--exit").wait() == 0
    delete_topics_and_groups(cluster, mark)
    admin = AdminClient(cluster.client_config)
    topics = set(admin.list_topics(timeout=10).topics)
    groups = {listing.group_id for listing in admin.list_consumer_groups().result(10).valid}
    assert topic in topics
    assert group in groups
    assert not any(name.startswith(mark) for name in topics | groups)
