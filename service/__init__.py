"""The inference service: trained bundles over the Open Inference Protocol, version 2."""
