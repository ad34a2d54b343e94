"""Replicas of a server, over machines: a front that sends each request to the one that knows what it begins with."""
