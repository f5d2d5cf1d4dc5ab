"""Answers to requests over HTTP."""
