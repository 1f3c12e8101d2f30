"""Quantized layers and attention: conversion by rules, finalization, audit, hooks."""
