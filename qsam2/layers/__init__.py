"""Quantized layers: conversion by rules, finalization, the audit."""
